"""Packages spion_ds: library, recipes, and the C++ sources that are compiled on first use.

With SPION_DS_PREBUILD=1 the wheel also ships the compiled operators, for the PyTorch that is
installed while it is built (pip wheel --no-build-isolation).
"""

import os
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
version = next(
    line.split('"')[1]
    for line in (here / "spion_ds" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)


def prebuilt():
    """Return the arguments of setup() that build the operators into the package, if asked for."""
    if os.environ.get("SPION_DS_PREBUILD", "0") in ("", "0"):
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    operators = CppExtension(
        name="spion_ds._ops",
        sources=sorted(str(path.relative_to(here)) for path in (here / "csrc").glob("*.cpp")),
        extra_compile_args=["-O3", "-g0", "-fopenmp"],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [operators], "cmdclass": {"build_ext": BuildExtension}}


setup(
    **prebuilt(),
    name="spion_ds",
    version=version,
    description="Dense-to-sparse training of Transformers (SPION) under DeepSpeed",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # csrc/ becomes spion_ds/csrc in a wheel, so that an installed package can compile it too.
    packages=[*find_packages(include=["spion_ds", "spion_ds.*"]), "spion_ds.csrc"],
    package_dir={"spion_ds.csrc": "csrc"},
    package_data={
        "spion_ds.recipes": ["*.yaml", "attention/*.yaml"],
        "spion_ds.csrc": ["*.cpp", "*.cu", "*.h", "hopper/*"],
    },
    install_requires=[
        "torch>=2.8",
        "deepspeed>=0.19.6",
        "numpy>=1.26",
        "pillow>=10.0",
        "pyyaml>=6.0",
        "safetensors>=0.4",
        "tensorboard>=2.16",
        "tqdm>=4.66",
        "ninja>=1.11",
        "setuptools>=77",
    ],
    extras_require={
        "gpu": ["triton>=3.4; platform_system == 'Linux'"],
        "mpi": ["mpi4py>=4.0", "openmpi>=5.0; platform_system == 'Linux'"],
        "dev": [
            "mypy>=1.11",
            "pre-commit>=4.0",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "transformers>=5.0",
            "triton>=3.4; platform_system == 'Linux'",
            "types-PyYAML",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
