"""Packages spion_ds: library, recipes, and the sources that are compiled on first use.

SPION_DS_PREBUILD=1 compiles them into the wheel, for the PyTorch that is installed while it is
built (pip wheel --no-build-isolation): the C++ operators, and with nvcc and a PyTorch with CUDA
the CUDA operators and Hopper kernels too. What cannot be compiled ends the build. Without it, or
with 0, nothing is compiled.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

here = Path(__file__).resolve().parent
version = next(
    line.split('"')[1]
    for line in (here / "spion_ds" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)


def prebuilt():
    """Return the arguments of setup() that compile the libraries into the package, if asked for."""
    wanted = os.environ.get("SPION_DS_PREBUILD", "")
    if wanted in ("", "0"):
        return {}
    if wanted != "1":
        sys.exit(
            f"error: SPION_DS_PREBUILD is {wanted!r}; allowed: 1 builds the operators into the "
            "wheel, 0 does not"
        )
    sys.path.insert(0, str(here))
    try:
        from spion_ds import compiling
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: SPION_DS_PREBUILD=1 compiles for the PyTorch that is installed, but {error}; "
            "install it, and give pip --no-build-isolation"
        )
    libraries, left_out = compiling.compilable()
    by_name = {f"spion_ds.{library.name}": library for library in libraries}

    class BuildLibraries(build_ext):
        """Compiles as the first use does; setuptools says where to."""

        def run(self):
            if left_out is not None:
                print(f"spion_ds: only the C++ operators are built: {left_out}", file=sys.stderr)
            super().run()

        def build_extension(self, ext):
            path = Path(self.get_ext_fullpath(ext.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            by_name[ext.name].write(path)

    extensions = [
        Extension(name, [str(source.relative_to(here)) for source in library.sources()])
        for name, library in by_name.items()
    ]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildLibraries}}


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
        # Its inner parts are used, which any release may change: make test-versions passes at both
        # ends, and tests/versions.py names them again.
        "deepspeed>=0.19.6,<=0.19.8",
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
            "accelerate>=1.10",
            "lightning>=2.5",
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
