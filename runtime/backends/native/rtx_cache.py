"""TensorRT-RTX's runtime cache on disk: kernels that the JIT compiled for this GPU, so that the next start is quick.

It is optional and never fatal. TensorRT-RTX has crashed on damaged caches, so a file carries its own checksum, and one
with a wrong checksum is removed before TensorRT-RTX reads it.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.system.files import write_atomically

_DIGEST_BYTES = 32
MAX_BYTES = 100 << 20
"""Limit of a cache; loading a larger one takes longer than it saves."""


class RuntimeCacheFile:
    """The cache of one engine; its file name is a hash of all that it depends on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache: Any = None
        self._loaded_content = b""

    @classmethod
    def for_engine(cls, folder: Path, engine_sha256: str, version: str, gpu: str, driver: str) -> RuntimeCacheFile:
        """Return the cache of an engine on this GPU, driver and release."""
        key = hashlib.sha256("\n".join((engine_sha256, version, gpu, driver)).encode()).hexdigest()[:24]
        return cls(folder / f"{key}.rtxcache")

    def attach(self, config: Any) -> None:
        """Give a runtime configuration a cache, filled from the file if its checksum is right."""
        with suppress(Exception):
            cache = config.create_runtime_cache()
            content = self.read()
            if content and not cache.deserialize(content):
                self.discard()
            config.set_runtime_cache(cache)
            self._cache, self._loaded_content = cache, content

    def save(self) -> None:
        """Write the kernels that the JIT added, if there are any."""
        if self._cache is None:
            return
        with suppress(Exception):
            content = bytes(self._cache.serialize())
            if content != self._loaded_content and len(content) <= MAX_BYTES:
                self.write(content)

    def read(self) -> bytes:
        """Return the content, or nothing; a damaged file is removed."""
        try:
            raw = self.path.read_bytes()
        except OSError:
            return b""
        digest, content = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() == digest:
            return content
        self.discard()
        return b""

    def write(self, content: bytes) -> None:
        """Store content with its checksum."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.path) as temp_path:
            temp_path.write_bytes(hashlib.sha256(content).digest() + content)

    def discard(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
