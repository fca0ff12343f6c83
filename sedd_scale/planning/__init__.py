"""Arithmetic about a run before it starts: parameters, memory, FLOPs and layouts; no torch."""

from sedd_scale.planning.layouts import LayoutFit, Plan, fit_layouts, plan

__all__ = ["LayoutFit", "Plan", "fit_layouts", "plan"]
