"""What a run saves, in a form that knows no layout: boxes of logical tensors in files."""
