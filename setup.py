from hashlib import blake2b
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "kagzi/_core.pyx"
SOURCE_HASH = blake2b((Path(__file__).parent / SOURCE).read_bytes(), digest_size=16).hexdigest()

setup(
    ext_modules=[
        Extension(
            "kagzi._core",
            [SOURCE],
            # Without quotes: the source makes a string of it, and no shell has to keep them.
            define_macros=[("KAGZI_SOURCE_HASH", SOURCE_HASH)],
        )
    ]
)
