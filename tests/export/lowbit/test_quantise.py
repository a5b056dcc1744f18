"""Quantised graphs: what is in them, that they compute what they should where they are promised, and how builds use them."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from calibration.lowbit.fake_quantise import make_int8_layers, replace_layers
from export.build_request import BuildRequest
from export.graphs.engine_graphs import ConditioningGraph, PredictorGraph, make_deployable
from export.graphs.onnx_files import count_initializer_bytes, export_onnx
from export.lowbit.casting import cast_network, equalise_network, restore_float32_layers
from export.lowbit.choice import CHOICE_SCHEMA, PrecisionChoice, read_choice, write_choice
from export.lowbit.equalise import collect_scales, fold_scales, insert_input_scales
from export.lowbit.guard import check_constants, check_weight_range, check_weights
from export.lowbit.layers import find_block, find_products, list_layers
from export.lowbit.quantise import count_weights_by_kind, quantise_int8, quantise_weights, store_float16
from export.lowbit.ranges import (
    CLIP_METHODS,
    RANGES_SCHEMA,
    TIME_BINS,
    LayerRanges,
    Ranges,
    RangesRecord,
    read_ranges,
    write_ranges,
)
from export.lowbit.recipe import EMPTY_RECIPE, Recipe, read_recipe
from export.lowbit.rounding import has_no_int16_overflow
from export.model import CheckpointModel
from export.targets import QUANTISED_PRECISIONS, parse_graph_format, resolve_graph_precision, resolve_precision
from export.tensorrt.compiler import EngineJob, build_engine
from flowturbo.checkpoints import Network
from flowturbo.models.sit import SiT, SiTConfig
from flowturbo.models.vae import Vae, load_vae
from runtime.backends.base import BackendOptions, EngineFile
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.directory.contract import build_graph_spec, build_profiles
from runtime.system.errors import CheckpointError, OutputError, ProofError, RequestError

CONFIG = SiTConfig(depth=2, width=64, heads=2, patch=2, latent_size=8, classes=10, learned_sigma=False)
LAYERS = list_layers("predictor", CONFIG.depth)
SPEC = build_graph_spec("predictor", channels=4, side=8, pixels=64, modulations=CONFIG.modulations)
SOURCES = {"predictor": "a" * 64}
Arrays = dict[str, NDArray[Any]]


def network(seed: int = 0) -> SiT:
    torch.manual_seed(seed)
    made = SiT(CONFIG)
    for weight in made.parameters():
        weight.data.normal_(std=0.06)
    return made.eval().requires_grad_(False)


def ranges_of(clip: float = 3.0, *, equal: bool = True, model: Mapping[str, str] = SOURCES) -> Ranges:
    """Made-up ranges with lively equalisers."""
    random, layers = np.random.Generator(np.random.Philox(3)), {}
    for name in LAYERS:
        channels = 4 * CONFIG.width if name.endswith("fc2") else CONFIG.width
        s = np.exp(random.standard_normal(channels) * 0.5).astype(np.float32)
        table = np.full((TIME_BINS + 1, len(CLIP_METHODS)), clip, np.float32)
        bins, errors = np.zeros((TIME_BINS, channels), np.float32), np.zeros(len(CLIP_METHODS), np.float32)
        layers[name] = LayerRanges(
            bins - clip, bins + clip, s if equal else np.ones_like(s), table, table, errors, errors
        )
    record = RangesRecord(
        RANGES_SCHEMA, model, {"samples": 1}, {"predictor": (0.0,)}, tuple(LAYERS), CLIP_METHODS, "test"
    )
    return Ranges(record, layers)


def inputs(images: int = 2) -> Arrays:
    random = np.random.Generator(np.random.Philox(5))
    made: Arrays = {}
    for name, tensor in SPEC.inputs.items():
        shape = tensor.resolve_shape({"B": images, "N": images})
        made[name] = np.zeros(shape, tensor.numpy_dtype)
        if name in ("base", "mods"):
            made[name] = random.standard_normal(shape, dtype=np.float32) * (1.0 if name == "base" else 0.5)
    made["point_coef"][0], made["update_coef"][0], made["update_coef"][-1], made["atol"][:] = 1.0, 1.0, 0.1, 1.0
    made["row_image"] = np.arange(images, dtype=np.int32)
    made["mix"] = np.stack([np.eye(images, dtype=np.float32)] * 4)
    return made


@lru_cache
def traced(dtype: torch.dtype) -> bytes:
    """The ONNX file of `network()`; tracing takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictor.onnx"
        export_onnx(PredictorGraph(cast_network(network(), dtype)), SPEC, path)
        return path.read_bytes()


def exported(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    path = folder / "predictor.onnx"
    path.write_bytes(traced(dtype))
    return path


def rows_of(path: Path, arrays: Arrays, precision: str = "int8") -> NDArray[Any]:
    """The `rows` of a graph on the runtime's own backend."""
    backend = OnnxRuntimeBackend(BackendOptions(provider="cpu", threads=1))
    engine = backend.load(EngineFile(path, "predictor", precision, SPEC, "", pairs_fit=True))
    sources, results = {}, {}
    for name, array in arrays.items():
        sources[name] = backend.allocate(array.shape, array.dtype)
        sources[name].upload(np.ascontiguousarray(array))
    sizes = {"B": len(arrays["base"]), "N": len(arrays["row_image"])}
    for name, tensor in SPEC.outputs.items():
        results[name] = backend.allocate(tensor.resolve_shape(sizes), tensor.numpy_dtype)
    engine.run(sources, results)
    return results["velocities"].numpy()


def off(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


# The layers by name


def test_every_layer_is_found_by_the_module_it_was_traced_from(tmp_path: Path) -> None:
    made, model = network(), onnx.load(exported(tmp_path))
    products = find_products(model, "predictor", "it")
    assert sorted(products) == sorted(LAYERS)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, product in products.items():
        layer = made.get_submodule(name.partition("/")[2])
        np.testing.assert_array_equal(weights[product.weight].T, layer.weight.numpy())  # type: ignore[operator, union-attr]
    assert find_block(LAYERS[-1]) == "predictor/blocks.1"


def test_a_graph_without_its_layers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "conditioning.onnx"
    spec = build_graph_spec("conditioning", channels=4, side=8, pixels=64, modulations=CONFIG.modulations)
    export_onnx(ConditioningGraph(make_deployable(network())), spec, path)
    with pytest.raises(ProofError, match="holds no product for any layer"):
        find_products(onnx.load(path), "predictor", path.name)


# int8


def test_an_int8_graph_computes_what_rounding_in_pytorch_does(tmp_path: Path) -> None:
    """To float32 rounding: also on a CPU without VNNI, whose fastest 8-bit product adds in 16 bits."""
    made, arrays, ranges = network(), inputs(), ranges_of(clip=1.5, equal=False)
    path = exported(tmp_path)
    plain = rows_of(path, arrays)
    clips = Recipe(ranges).select_clips("predictor")
    model = quantise_int8(path, "predictor", clips)
    assert ops(model)["QuantizeLinear"] == len(LAYERS)  # of the inputs; the weights are stored as integers
    with replace_layers({"predictor": made}, make_int8_layers({"predictor": made}, ranges, "mse", equalised=False)):
        expected = made.trunk(torch.from_numpy(arrays["base"]), torch.from_numpy(arrays["mods"])).numpy()
    found = rows_of(path, arrays)
    assert off(found, expected) < 1e-3
    assert off(plain, expected) > 0.02  # the rounding is there
    assert off(rows_of(path, arrays), plain) < 0.5


def test_the_weights_are_stored_as_int8_per_channel_without_zero_points(tmp_path: Path) -> None:
    path = exported(tmp_path)
    before = path.stat().st_size
    model = quantise_int8(path, "predictor", Recipe(ranges_of()).select_clips("predictor"))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    integers = {name: array for name, array in stored.items() if array.dtype == np.int8 and array.ndim == 2}
    assert len(integers) == len(LAYERS)
    assert all(has_no_int16_overflow(array) and np.abs(array.astype(int)).max() > 100 for array in integers.values())
    for name, array in stored.items():
        if "zero_point" in name:
            assert not array.any()
    dequantised = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    assert all(stored[name].dtype == np.int8 for name in dequantised & stored.keys())  # TensorRT takes no int32 bias
    assert path.stat().st_size < 0.6 * before  # of a graph this small, much is no weight
    assert count_initializer_bytes(model) < path.stat().st_size


def test_int8_on_top_of_float16_runs_as_well(tmp_path: Path) -> None:
    """The set for TensorRT, which is proved on ONNX Runtime where no GPU is."""
    path, arrays = exported(tmp_path, torch.float16), inputs()
    plain = rows_of(path, arrays, "fp16")
    model = quantise_int8(path, "predictor", Recipe(ranges_of(clip=3.0)).select_clips("predictor"))
    assert {t.data_type for t in model.graph.initializer if t.name.endswith("_scale")} == {onnx.TensorProto.FLOAT16}
    assert 1e-3 < off(rows_of(path, arrays), plain) < 0.3


def test_layers_that_stay_wide_are_left_alone(tmp_path: Path) -> None:
    wide = (LAYERS[0], LAYERS[5])
    recipe = Recipe(ranges_of(), PrecisionChoice(CHOICE_SCHEMA, "int8", SOURCES, wide, equalised=False))
    model = quantise_int8(exported(tmp_path), "predictor", recipe.select_clips("predictor"))
    assert ops(model)["QuantizeLinear"] == len(LAYERS) - 2
    assert quantise_int8(exported(tmp_path), "predictor", {}).graph.node  # nothing to quantise is no error


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """Rather than left wide, which nobody would see."""
    missing = "predictor/blocks.7.mlp.fc1"
    with pytest.raises(ProofError, match=r"predictor\.onnx holds no product for predictor/blocks\.7\.mlp\.fc1"):
        quantise_int8(exported(tmp_path), "predictor", {missing: 1.0})
    with pytest.raises(ProofError, match="holds no product for"):
        quantise_weights(exported(tmp_path), "predictor", "int8-weights", [*LAYERS, missing], has_nbits_operators=True)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_that_is_no_number_is_refused(tmp_path: Path, clip: float) -> None:
    with pytest.raises(RequestError, match=r"clips of predictor/blocks\.0"):
        quantise_int8(exported(tmp_path), "predictor", {LAYERS[0]: clip})


# Equalisation


@pytest.mark.parametrize("only", [*("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), ""])
def test_equalising_changes_nothing_but_the_layers_inputs(only: str) -> None:
    made = network()
    scales = {name: s for name, s in collect_scales(ranges_of(), "predictor").items() if name.endswith(only)}
    assert len(scales) == (2 if only else len(LAYERS))
    other = insert_input_scales(fold_scales(made, scales), scales)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1, 2, 3])
    seen: dict[str, torch.Tensor] = {}
    for which, net in (("before", made), ("after", other)):
        for name in scales:
            layer = net.get_submodule(name)
            layer.register_forward_pre_hook(lambda module, read, key=f"{which} {name}": seen.update({key: read[0]}))
    np.testing.assert_allclose(other(x, t, y), made(x, t, y), rtol=1e-3, atol=1e-5)
    for name, s in scales.items():
        read = seen[f"after {name}"]
        if not name.endswith("fc2"):  # divides inside
            np.testing.assert_allclose(read * s, seen[f"before {name}"], rtol=2e-3, atol=1e-5)
    assert made.get_submodule("blocks.0.attn.qkv").weight is not other.get_submodule("blocks.0.attn.qkv").weight


def test_wide_layers_are_not_equalised() -> None:
    assert set(collect_scales(ranges_of(), "predictor", (LAYERS[0],))) == {n.partition("/")[2] for n in LAYERS[1:]}
    assert collect_scales(ranges_of(equal=False), "predictor") == {}


# Weights alone


@pytest.mark.parametrize(
    ("precision", "dtype", "op", "error"),
    [
        ("int8-weights", torch.float32, "MatMulNBits", 0.02),
        ("int4-weights", torch.float32, "MatMulNBits", 0.2),
        ("int8-weights", torch.float16, "DequantizeLinear", 0.02),
        ("int4-weights", torch.float16, "DequantizeLinear", 0.3),
    ],
)
def test_weights_alone(tmp_path: Path, precision: str, dtype: torch.dtype, op: str, error: float) -> None:
    path, arrays = exported(tmp_path, dtype=dtype), inputs()
    before, plain = path.stat().st_size, rows_of(path, arrays)
    model = quantise_weights(path, "predictor", precision, LAYERS, has_nbits_operators=dtype == torch.float32)
    assert ops(model)[op] == len(LAYERS)
    assert 1e-5 < off(rows_of(path, arrays, precision), plain) < error
    assert path.stat().st_size < (0.5 if dtype == torch.float32 else 0.8) * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("precision", QUANTISED_PRECISIONS)
def test_every_byte_of_a_trunks_constants_is_accounted_for(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    path, wide = exported(tmp_path, dtype), LAYERS[2:3]
    low = [name for name in LAYERS if name not in wide]
    if precision == "int8":
        model = quantise_int8(path, "predictor", dict.fromkeys(low, 3.0))
    else:
        model = quantise_weights(path, "predictor", precision, low, has_nbits_operators=dtype == torch.float32)
    found = count_weights_by_kind(model)
    sizes = {name: network().get_submodule(name.partition("/")[2]).weight.numel() for name in LAYERS}  # type: ignore[operator, union-attr]
    bits = 4 if precision == "int4-weights" else 8
    assert found["quantised"] == sum(sizes[name] for name in low) * bits // 8
    assert found["wide"] == sum(sizes[name] for name in wide) * dtype.itemsize
    assert 0 < found["scales"] < 0.2 * found["quantised"] * 8 / bits
    assert sum(found.values()) == count_initializer_bytes(model) < path.stat().st_size
    assert 0 < found["rest"] < 0.35 * count_initializer_bytes(model)


def test_a_file_that_could_not_be_written_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights lie beside it under a name that the earlier file refers to as well, so neither would be whole."""
    path = exported(tmp_path)
    monkeypatch.setattr("export.graphs.onnx_files.EXTERNAL_BYTES", 0)
    store_float16(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["predictor.onnx", "predictor.onnx.data"]

    def full(*arguments: Any, **options: Any) -> None:
        (tmp_path / options["location"]).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.graphs.onnx_files.onnx.save", full)
    with pytest.raises(OutputError, match="No space left"):
        store_float16(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", QUANTISED_PRECISIONS)
def test_nvidias_parser_and_builder_take_every_form(tmp_path: Path, precision: str) -> None:
    """TensorRT-RTX's, which need no GPU, in TensorRT's place for int8."""
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("polygraphy")
    path, out = exported(tmp_path, torch.float16), tmp_path / "predictor.engine"
    if precision == "int8":
        quantise_int8(path, "predictor", Recipe(ranges_of()).select_clips("predictor"))
    else:
        quantise_weights(path, "predictor", precision, LAYERS, has_nbits_operators=False)
    built = build_engine(EngineJob(path, out, "predictor", "rtx", precision, SPEC, build_profiles(2, static=False)))
    stored = {"int8": "INT8", "int8-weights": "INT8", "int4-weights": "INT4"}[precision]
    assert built.layers["CONSTANT"][stored] == len(LAYERS)
    assert sum(built.layers["DEQUANTIZE"].values()) == len(LAYERS) * (2 if precision == "int8" else 1)
    assert ("QUANTIZE" in built.layers) == (precision == "int8")
    assert built.layers["NORMALIZATION"] == {"FLOAT": 2 * CONFIG.depth + 1}
    assert out.stat().st_size == built.bytes


def test_files_of_16_bits_compute_in_float32(tmp_path: Path) -> None:
    path, arrays = exported(tmp_path), inputs()
    before, plain = path.stat().st_size, rows_of(path, arrays)
    store_float16(path)
    assert 0 < off(rows_of(path, arrays), plain) < 2e-3
    assert path.stat().st_size < 0.65 * before
    assert {i.type for i in ort.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()} == {
        "tensor(float)", "tensor(int32)",
    }  # fmt: skip


def test_weights_beyond_float16_stay_in_float32(tmp_path: Path) -> None:
    path = exported(tmp_path)
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if list(t.dims) == [CONFIG.width, 4 * CONFIG.width])
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] = 1e6
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    stored = {t.name: numpy_helper.to_array(t) for t in store_float16(path).graph.initializer}
    assert any(array.dtype == np.float32 and array.max() == 1e6 for array in stored.values())
    assert all(np.isfinite(array).all() for array in stored.values())


# Islands of a 16-bit build


def test_islands_compute_in_float32() -> None:
    made = network()
    made.get_submodule("blocks.1.mlp.fc2").weight[0, 0] = 7e4  # type: ignore[index, union-attr]
    small = network()
    parts = ("blocks.1.mlp.fc2", "blocks.0.attn.softmax")
    cast = restore_float32_layers(cast_network(small, torch.float16), make_deployable(made), parts)
    assert cast.get_submodule("blocks.1.mlp.fc2").weight.dtype == torch.float32
    assert float(cast.get_submodule("blocks.1.mlp.fc2").weight.max()) == 7e4  # type: ignore[arg-type, operator]
    assert [block.attn.float32_softmax for block in cast.blocks] == [True, False]  # type: ignore[union-attr]
    with pytest.raises(RequestError, match=r"blocks\.9"):
        restore_float32_layers(cast, make_deployable(made), ["blocks.9.mlp.fc2"])


# The files


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    path, ranges = tmp_path / "r.npz", ranges_of()
    write_ranges(path, ranges)
    read = read_ranges(path)
    assert read.sha256 == ranges.sha256
    assert read.record == ranges.record
    first = path.read_bytes()
    write_ranges(path, read)
    assert path.read_bytes() == first


def altered(path: Path, how: Callable[[Arrays], None]) -> Path:
    with np.load(path) as kept:
        arrays = {name: kept[name] for name in kept.files}
    how(arrays)
    np.savez(path, **arrays)
    return path


def test_bad_calibrations_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    with pytest.raises(RequestError, match="no calibration at"):
        read_ranges(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(RequestError, match="no calibration, or a damaged one"):
        read_ranges(path)
    write_ranges(path, ranges_of())
    with pytest.raises(RequestError, match="altered"):
        read_ranges(altered(path, lambda a: a.update({f"{LAYERS[0]}/plain": a[f"{LAYERS[0]}/plain"] * 2})))
    write_ranges(path, ranges_of())
    for record in ("no JSON", "[]"):
        with pytest.raises(RequestError, match="is no calibration"):
            read_ranges(altered(path, lambda a, record=record: a.update(record=np.asarray(record))))
    ranges = ranges_of()
    write_ranges(path, replace(ranges, record=replace(ranges.record, methods=("minmax",))))
    with pytest.raises(RequestError, match="has methods minmax"):
        read_ranges(path)
    write_ranges(path, ranges_of())
    with pytest.raises(RequestError, match="lacks something"):
        read_ranges(altered(path, lambda a: a.pop(f"{LAYERS[0]}/plain")))


def test_a_calibration_that_lacks_layers_is_refused() -> None:
    """They would stay wide and nobody would know."""
    ranges = ranges_of()
    ranges.check_layers(LAYERS)
    fewer = replace(ranges, layers={name: one for name, one in ranges.layers.items() if name != LAYERS[3]})
    with pytest.raises(RequestError, match=r"lacks predictor/blocks\.0\.mlp\.fc2") as caught:
        fewer.check_layers(LAYERS)
    assert "8 layers" in caught.value.allowed


def test_a_calibration_of_another_model_is_refused() -> None:
    ranges = ranges_of()
    ranges.check_model({"predictor": "a" * 64, "refiner": "none"}, "r.npz")
    with pytest.raises(RequestError, match="measured on another predictor"):
        ranges.check_model({"predictor": "b" * 64}, "r.npz")
    with pytest.raises(RequestError, match="measured on no refiner"):
        ranges.check_model({"predictor": "a" * 64, "refiner": "c" * 64}, "r.npz")


def test_choices_are_checked(tmp_path: Path) -> None:
    path, ranges = tmp_path / "c.json", ranges_of()
    choice = PrecisionChoice(
        CHOICE_SCHEMA, "int8", SOURCES, (LAYERS[1],), ranges.sha256, "entropy", True, {"psnr_db": 30.0}
    )
    write_choice(path, choice)
    assert read_choice(path) == choice
    choice.check("int8", SOURCES, ranges, "c")
    for other, sources, kept, message in (
        ("fp16", SOURCES, None, "searched for int8"),
        ("int8", {"predictor": "b" * 64}, ranges, "another predictor"),
        ("int8", SOURCES, ranges_of(clip=2), "another calibration"),
    ):
        with pytest.raises(RequestError, match=message):
            choice.check(other, sources, kept, "c")
    with pytest.raises(RequestError, match=r"lacks: predictor/blocks\.7"):
        replace(choice, wide=("predictor/blocks.7.attn.qkv",)).check("int8", SOURCES, ranges, "c")
    path.write_text(path.read_text().replace("entropy", "minmax"))
    with pytest.raises(RequestError, match="altered"):
        read_choice(path)
    with pytest.raises(RequestError, match="no choice at"):
        read_choice(tmp_path / "none.json")
    path.write_text("[1]")
    with pytest.raises(RequestError, match="is no choice"):
        read_choice(path)


def test_recipes_need_what_their_precision_needs(tmp_path: Path) -> None:
    path, choice = tmp_path / "r.npz", tmp_path / "c.json"
    write_ranges(path, ranges_of())
    write_choice(
        choice, PrecisionChoice(CHOICE_SCHEMA, "fp16", SOURCES, ("predictor/blocks.0.attn.softmax", "decoder-ema"))
    )
    assert read_recipe(path, None, {"cpu": "int8"}, SOURCES).inputs.keys() == {"calibration", "rounding"}
    recipe = read_recipe(None, choice, {"cuda": "fp16"}, SOURCES)
    assert recipe.list_wide_parts("predictor") == ("blocks.0.attn.softmax",)
    for calibration, chosen, precision, message in (
        (None, None, "int8", "int8 without a calibration"),
        (path, None, "fp16", "--calibration with precision fp16"),
        (None, choice, "int8-weights", "--choice with precision int8-weights"),
        (path, choice, "int8", "searched for fp16"),
    ):
        with pytest.raises(RequestError, match=message):
            read_recipe(calibration, chosen, {"cpu": precision}, SOURCES)


# Which pairs there are


def test_forms_of_files() -> None:
    assert resolve_graph_precision("tensorrt", "int8") == "int8-fp16"
    for files, base, quantised, operators in (
        ("fp32", "fp32", None, False),
        ("bf16", "bf16", None, False),
        ("int8", "fp32", "int8", False),
        ("int8-fp16", "fp16", "int8", False),
        ("int4-weights", "fp32", "int4-weights", True),
        ("int8-weights-fp16", "fp16", "int8-weights", False),
    ):
        form = parse_graph_format(files)
        assert (form.base, form.quantised, form.has_nbits_operators) == (base, quantised, operators)


@pytest.mark.parametrize(
    ("target", "precision", "why"),
    [("openvino", "int8", "refused"), ("openvino", "int4-weights", "refused"), ("rtx", "int8", "weights only")],
)
def test_pairs_that_are_not_promised_say_why(target: str, precision: str, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        resolve_precision(precision, target, amx=False)


# What 16 bits cannot hold


def test_weights_that_float16_cannot_hold_are_listed_all_at_once() -> None:
    broken = network()
    for part in ("blocks.0.mlp.fc1", "blocks.1.attn.qkv"):
        broken.get_submodule(part).weight[0, 0] = -1e5  # type: ignore[index, union-attr]
    with pytest.raises(CheckpointError) as caught:
        check_weights({"predictor": broken, "decoder-ema": network()}, torch.float16, remedy="build it wider")
    assert "predictor/blocks.0.mlp.fc1.weight (1e+05)" in caught.value.given
    assert "predictor/blocks.1.attn.qkv.weight" in caught.value.given
    assert "decoder" not in caught.value.given and caught.value.remedy == "build it wider"
    check_weights({"predictor": broken}, torch.bfloat16, remedy="")
    check_weights({"predictor": broken}, torch.float16, lambda name: "fc1" in name or "qkv" in name, remedy="")


def model_of(made: SiT, vaes: Mapping[str, Vae] = {}) -> CheckpointModel:
    return CheckpointModel(Network(made), None, dict(vaes), 8, ())


def build_of(recipe: Recipe = EMPTY_RECIPE, *, encoder: bool = False) -> BuildRequest:
    """A request that says how a model is cast; the model is given beside it."""
    return BuildRequest(Path("p.pt"), None, (), (), None, None, {"cuda": "int8"}, 1, False, encoder, None, {}, recipe)


def with_weight(part: str, value: float, column: int = 0) -> SiT:
    made = network()
    made.get_submodule(part).weight[0, column] = value  # type: ignore[index, union-attr]
    return made


def with_equaliser(part: str, value: float) -> Ranges:
    """Ranges that leave every layer alone but for channel 0 of one."""
    ranges = ranges_of(equal=False)
    name = f"predictor/{part}"
    s = ranges.layers[name].equaliser.copy()
    s[0] = value
    return replace(ranges, layers={**ranges.layers, name: replace(ranges.layers[name], equaliser=s)})


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_the_weights_of_an_int8_build_are_judged_as_they_are_cast(part: str) -> None:
    """Equalising may push a weight over the end of float16's range, and may bring one back."""
    layer, form = f"blocks.1.{part}", parse_graph_format("int8-fp16")
    pushed, brought = with_weight(layer, 6e4), with_weight(layer, 1e5)
    check_weight_range(model_of(pushed), build_of(Recipe(with_equaliser(layer, 1.0))), form)
    with pytest.raises(CheckpointError, match=rf"predictor/{layer}\.weight \(1\.2e\+05\)") as caught:
        check_weight_range(model_of(pushed), build_of(Recipe(with_equaliser(layer, 2.0))), form)
    assert "--target cpu" in caught.value.remedy
    halved = Recipe(with_equaliser(layer, 0.5))
    check_weight_range(model_of(brought), build_of(halved), form)
    with pytest.raises(CheckpointError, match="1e\\+05"):
        check_weight_range(
            model_of(brought), build_of(), parse_graph_format("int8-weights-fp16")
        )  # nothing equalises those
    for scale, recipe, fits in ((6e4, Recipe(with_equaliser(layer, 2.0)), False), (1e5, halved, True)):
        cast = equalise_network(with_weight(layer, scale), "predictor", recipe).half()
        assert all(bool(torch.isfinite(tensor).all()) for tensor in cast.state_dict().values()) == fits


def test_the_division_that_stays_in_the_trunk_is_judged_too() -> None:
    layer = "blocks.0.mlp.fc2"
    with pytest.raises(CheckpointError, match=rf"predictor/{layer}\.inverse \(1e\+05\)"):
        check_weight_range(
            model_of(network()), build_of(Recipe(with_equaliser(layer, 1e-5))), parse_graph_format("int8-fp16")
        )


def test_only_islands_of_float32_are_left_out() -> None:
    """What a choice keeps out of int8 is cast to float16; what it keeps out of float16 is not."""
    layer = "blocks.0.mlp.fc1"
    huge, wide = model_of(with_weight(layer, 1e5)), (f"predictor/{layer}",)
    island = Recipe(None, PrecisionChoice(CHOICE_SCHEMA, "fp16", SOURCES, wide))
    check_weight_range(huge, build_of(island), parse_graph_format("fp16"))
    kept = Recipe(ranges_of(equal=False), PrecisionChoice(CHOICE_SCHEMA, "int8", SOURCES, wide))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc1\.weight"):
        check_weight_range(huge, build_of(kept), parse_graph_format("int8-fp16"))
    check_weight_range(huge, build_of(kept), parse_graph_format("int8"))  # stands on float32
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc1\.weight") as caught:
        check_weight_range(huge, build_of(), parse_graph_format("fp16"))
    assert "sensitivity --precision fp16" in caught.value.remedy


def test_only_the_halves_of_an_autoencoder_that_are_built_are_judged(vae: Path) -> None:
    loaded = load_vae(str(vae))
    for half, encoder, wide, broken in (
        ("encoder", False, False, ""),
        ("encoder", True, False, "encoder/encoder.conv_in.weight"),
        ("encoder", True, True, "encoder/encoder.conv_in.weight"),  # a wide decoder does not widen it
        ("decoder", False, False, "decoder-small/decoder.conv_in.weight"),
        ("decoder", True, True, ""),
    ):
        module = copy.deepcopy(loaded.module)
        module.get_submodule(f"{half}.conv_in").weight[0, 0, 0, 0] = 1e6  # type: ignore[index, union-attr]
        model = model_of(network(), {"small": replace(loaded, module=module)})
        recipe = Recipe(None, PrecisionChoice(CHOICE_SCHEMA, "fp16", SOURCES, ("decoder-small",) if wide else ()))
        request = build_of(recipe, encoder=encoder)
        if not broken:
            check_weight_range(model, request, parse_graph_format("fp16"))
            continue
        with pytest.raises(CheckpointError) as caught:
            check_weight_range(model, request, parse_graph_format("fp16"))
        assert caught.value.given.endswith(f": {broken} (1e+06)")


def test_constants_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    model = onnx.load(exported(tmp_path, torch.float16))
    check_constants(model, "it")
    clipped = quantise_int8(tmp_path / "predictor.onnx", "predictor", dict.fromkeys(LAYERS, 4.0))
    check_constants(clipped, "it")
    name = next(node.input[1] for node in clipped.graph.node if node.op_type == "QuantizeLinear")
    scale = next(t for t in clipped.graph.initializer if t.name == name)
    scale.CopyFrom(numpy_helper.from_array(np.zeros((), np.float16), name))
    with pytest.raises(ProofError, match="cannot"):
        check_constants(clipped, "it")  # everything would be NaN
    tensor = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16)
    tensor.CopyFrom(numpy_helper.from_array(np.full(list(tensor.dims), np.inf, np.float16), tensor.name))
    with pytest.raises(ProofError, match="holds constants"):
        check_constants(model, "it")
