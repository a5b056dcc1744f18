"""Keep the former path of `runtime.system.array_store` for its importers."""

from runtime.system.array_store import Arrays as Arrays
from runtime.system.array_store import hash_json as hash_json
from runtime.system.array_store import load_arrays as load_arrays
from runtime.system.array_store import save_arrays as save_arrays
