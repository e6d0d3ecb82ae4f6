"""The part of the build that pyproject.toml cannot say: the native library and the YAML folder."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

CSRC = Path("allocator/csrc")
# Needs torch's headers, so it is compiled at first use, against the torch that is there then.
AT_FIRST_USE = "torch_cpu.cpp"

sleep_pool = Extension(
    "allocator._sleep_pool",
    sources=sorted(str(path) for path in CSRC.glob("*.cpp") if path.name != AT_FIRST_USE),
    depends=sorted(str(path) for path in CSRC.glob("*.h")),
    include_dirs=[str(CSRC)],
    extra_compile_args=["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"],
    extra_link_args=["-pthread", "-ldl"],
    language="c++",
)

setup(
    packages=[
        *find_packages(include=["rlhf_npu", "rlhf_npu.*", "allocator", "allocator.*"]),
        "rlhf_npu.configs",
    ],
    package_dir={"rlhf_npu.configs": "configs"},
    package_data={
        "allocator": ["csrc/*.cpp", "csrc/*.h"],
        "rlhf_npu": ["py.typed"],
        "rlhf_npu.configs": ["**/*.yaml"],
    },
    ext_modules=[sleep_pool],
)
