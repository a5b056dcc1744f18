"""The exported graphs keep the engine contract: their arithmetic, their shapes and what they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from golden import Golden, measure_relative_difference
from numpy.typing import NDArray

from export.graphs.engine_graphs import ConditioningGraph, PredictorGraph, make_deployable
from export.graphs.onnx_files import FORBIDDEN_OPS, OPSET, check_graph, count_initializer_bytes, count_ops, export_onnx
from flowturbo.checkpoints import resize_network
from flowturbo.models.sit import SiT, SiTConfig
from runtime.backends import fake
from runtime.directory.contract import GraphSpec, build_conditioning_spec, build_trunk_spec
from runtime.directory.manifest import read_manifest
from runtime.directory.records import Manifest
from runtime.sampling.guidance import BranchBatch, build_class_branches
from runtime.sampling.plan import HISTORY
from runtime.system.errors import ProofError

Arrays = dict[str, NDArray[Any]]
NULL = 10
CASES = {
    "guided B2 N4": ([3, 4], [4.0, 1.5]),
    "guided B1 N2": ([3], [4.0]),
    "unguided B3 N3": ([1, 2, 3], [1.0, 1.0, 1.0]),
    "unguided B1 N1": ([9], [1.0]),
    "mixed B3 N4": ([1, 2, 3], [1.0, 2.0, 1.0]),
}


@pytest.fixture(scope="module")
def manifest(tiny_engines: Path) -> Manifest:
    return read_manifest(tiny_engines)


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def model_of(folder: Path, manifest: Manifest, graph: str) -> onnx.ModelProto:
    record = manifest.find_graph(graph, 32, "fp32")
    assert record is not None
    return onnx.load(str(folder / record.path))


@pytest.fixture(scope="module")
def sessions(tiny_engines: Path, manifest: Manifest) -> Mapping[str, Any]:
    return {record.graph: session(tiny_engines / record.path) for record in manifest.graphs}


def contract_inputs(spec: GraphSpec, rows: BranchBatch, random: np.random.Generator) -> Arrays:
    """Every input drawn, every history slot and coefficient in use."""
    sizes = {"B": int(rows.row_image.max()) + 1, "N": len(rows.labels)}
    inputs: Arrays = {
        name: random.standard_normal(tensor.resolve_shape(sizes)).astype(tensor.numpy_dtype)
        for name, tensor in spec.inputs.items()
    }
    inputs |= {name: np.abs(inputs[name]) + 0.1 for name in ("atol", "rtol")}
    inputs |= {name: inputs[name] * np.float32(0.3) for name in ("point_coef", "update_coef", "error_coef")}
    return inputs | {"row_image": rows.row_image, "mix": rows.mix}


def expected_of(network: SiT, inputs: Arrays, times: NDArray[np.float32], rows: BranchBatch) -> Arrays:
    """DESIGN §4 in float64, round the network in PyTorch."""
    x64 = {name: array.astype(np.float64) for name, array in inputs.items()}
    base, slopes, a, b, e = (x64[name] for name in ("base", "slopes", "point_coef", "update_coef", "error_coef"))

    def total(own: Any, weights: Any) -> Any:  # base (or new slope) and history
        return own + np.einsum("kb,kbchw->bchw", weights, slopes)

    def each(values: Any, tensor: Any) -> Any:
        return values.reshape(-1, 1, 1, 1) * tensor

    x = total(each(a[0], base), a[1:])[rows.row_image]
    read = np.concatenate([x, x64["velocity"]], axis=1) if "velocity" in inputs else x
    with torch.inference_mode():
        out = network(
            torch.from_numpy(read.astype(np.float32)), torch.from_numpy(times), torch.from_numpy(rows.labels).long()
        ).double()
    guided = np.einsum("cnm,mchw->nchw", x64["mix"], out.numpy()) + (x64["residual"] if "residual" in inputs else 0)
    slope = guided[: len(base)]
    x_next = total(each(b[0], base) + each(b[-1], slope), b[1:-1])
    error = total(each(e[-1], slope), e[:-1])
    tolerance = each(x64["atol"], 1.0) + each(x64["rtol"], np.maximum(np.abs(base), np.abs(x_next)))
    rms = lambda tensor: np.sqrt(np.mean(np.square(tensor), axis=(1, 2, 3)))  # noqa: E731 - one expression
    return {
        "slope": slope,
        "velocities": guided,
        "x_next": x_next,
        "err": rms(error / tolerance),
        "slope_rms": rms(slope),
    }


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("graph", ["predictor", "refiner"])
def test_one_graph_serves_guided_unguided_and_mixed_batches(
    sessions: Mapping[str, Any],
    manifest: Manifest,
    golden_s: Golden,
    random: np.random.Generator,
    graph: str,
    case: str,
) -> None:
    labels, scales = CASES[case]
    rows = build_class_branches(labels, scales, NULL, 4)
    inputs = contract_inputs(manifest.build_spec(graph, 32), rows, random)
    times = np.linspace(0.1, 0.9, len(labels), dtype=np.float32)[rows.row_image]
    conditioning = "conditioning" if graph == "predictor" else "refiner_conditioning"
    inputs["mods"] = sessions[conditioning].run(None, {"t": times, "y": rows.labels})[0]
    found = dict(zip(manifest.build_spec(graph, 32).outputs, sessions[graph].run(None, inputs), strict=True))
    expected = expected_of(getattr(golden_s, graph), inputs, times, rows)
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        assert measure_relative_difference(found[name], array) < 1e-5, name


def test_the_fake_device_keeps_the_same_contract(random: np.random.Generator) -> None:
    """Its arithmetic is the one that the exported graphs are held to."""

    class Formula(SiT):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            v = fake.compute_velocity(x[:, :4].numpy(), t.numpy(), y.numpy().astype(np.float32))
            return torch.from_numpy(v - (x[:, 4:].numpy() if x.shape[1] == 8 else 0))

    for refiner in (False, True):
        rows = build_class_branches([1, 2, 3], [1.0, 2.0, 1.0], NULL, 4)
        inputs = contract_inputs(build_trunk_spec(4, 4, 2, refiner=refiner), rows, random)
        times = np.linspace(0.1, 0.9, 3, dtype=np.float32)[rows.row_image]
        inputs["mods"] = np.stack([times, rows.labels.astype(np.float32)], axis=1)
        found = fake.evaluate_trunk(inputs, refiner)
        for name, array in expected_of(Formula(), inputs, times, rows).items():
            assert measure_relative_difference(found[name], array) < 1e-5, name


def test_conditioning_is_the_networks(sessions: Mapping[str, Any], golden_s: Golden) -> None:
    t, y = np.linspace(0, 1, 7, dtype=np.float32), np.asarray([0, 1, 2, 3, 9, NULL, NULL], np.int32)
    for graph, network in (("conditioning", golden_s.predictor), ("refiner_conditioning", golden_s.refiner)):
        found = sessions[graph].run(None, {"t": t, "y": y})[0]
        assert (
            measure_relative_difference(
                found, network.conditioning(torch.from_numpy(t), torch.from_numpy(y).long()).detach()
            )
            < 1e-5
        )
        alone = sessions[graph].run(None, {"t": t[:1], "y": y[:1]})[0]
        assert measure_relative_difference(alone[0], found[0]) < 1e-5


def test_time_runs_backwards_inside_the_graphs(golden_nosigma: Golden) -> None:
    """A REPA network's graphs take and give this package's direction: v(x, t) = −net(x, 1 − t)."""
    own = golden_nosigma.predictor
    turned = SiT(replace(own.config, time_direction="data-to-noise"))
    turned.load_state_dict(own.state_dict())
    network = make_deployable(turned.eval().requires_grad_(False))
    rows = build_class_branches([int(y) for y in golden_nosigma.arrays["y"]], [1.0, 1.0], 1000, 4)
    spec = build_trunk_spec(4, 8, own.config.modulations, refiner=False)
    inputs = {name: torch.zeros(tensor.resolve_shape({"B": 2, "N": 2})) for name, tensor in spec.inputs.items()}
    inputs |= {"base": golden_nosigma.read_tensor("x"), "atol": torch.ones(2)}
    inputs |= {"row_image": torch.from_numpy(rows.row_image), "mix": torch.from_numpy(rows.mix)}
    inputs["point_coef"][0] = 1
    x, t, y = (golden_nosigma.read_tensor(name) for name in "xty")
    with torch.inference_mode():
        inputs["mods"] = ConditioningGraph(network)(t, y)
        slope = PredictorGraph(network)(**inputs)[0]
        assert measure_relative_difference(slope, -own(x, 1 - t, y)) < 1e-5


@pytest.mark.parametrize("learned_sigma", [False, True])
def test_a_network_that_is_deployed_stays_as_it_was(learned_sigma: bool) -> None:
    """The twin to trace is another in everything but its weights, which it does not copy."""
    model = SiT(SiTConfig(1, 16, 2, 2, 4, classes=2, learned_sigma=learned_sigma)).train()
    twin = make_deployable(model)
    assert twin.blocks[0].attn.is_unfused
    assert not twin.training
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert not model.blocks[0].attn.is_unfused
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert twin.blocks[0].mlp.fc1.weight.data_ptr() == model.blocks[0].mlp.fc1.weight.data_ptr()
    assert twin.pos_embed.data_ptr() == model.pos_embed.data_ptr()


def graph_names(manifest: Manifest) -> Iterator[str]:
    return (record.graph for record in manifest.graphs)


def test_every_graph_is_there(manifest: Manifest) -> None:
    assert list(graph_names(manifest)) == [
        "conditioning",
        "predictor",
        "refiner_conditioning",
        "refiner",
        "decoder-small",
    ]
    assert {record.opset for record in manifest.graphs} == {OPSET}


def test_declared_inputs_and_outputs_are_the_contracts(tiny_engines: Path, manifest: Manifest) -> None:
    kinds = {"float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32}
    for graph in graph_names(manifest):
        model, spec = model_of(tiny_engines, manifest, graph), manifest.build_spec(graph, 32)
        for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
            assert [value.name for value in values] == list(tensors)
            for value in values:
                tensor = value.type.tensor_type
                assert tensor.elem_type == kinds[tensors[value.name].dtype]
                dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
                assert dims == tensors[value.name].shape, f"{graph}: {value.name}"


@pytest.mark.parametrize(("graph", "depth"), [("predictor", 3), ("refiner", 1)])
def test_what_a_trunk_is_made_of(tiny_engines: Path, manifest: Manifest, graph: str, depth: int) -> None:
    ops = count_ops(model_of(tiny_engines, manifest, graph))
    assert ops["LayerNormalization"] == 2 * depth + 1  # one op per norm, none taken apart
    assert ops["Softmax"] == depth
    assert ops["Gelu"] == depth
    assert ops.get("Shape", 0) <= 1  # no shape arithmetic is left
    assert not {"GatherND", "Where", "Expand", "Range", "ConstantOfShape"} & set(ops)
    assert ops == manifest.find_graph(graph, 32, "fp32").ops  # type: ignore[union-attr]


def test_no_forbidden_op_and_one_opset(tiny_engines: Path, manifest: Manifest) -> None:
    for graph in graph_names(manifest):
        model = model_of(tiny_engines, manifest, graph)
        assert not FORBIDDEN_OPS & set(count_ops(model))
        assert {(opset.domain or "ai.onnx", opset.version) for opset in model.opset_import} == {("ai.onnx", OPSET)}
        assert not model.functions
        onnx.checker.check_model(model)


def test_no_sizes_are_computed_with_int64(tiny_engines: Path, manifest: Manifest) -> None:
    """Hundreds of int64 shape operations are what engines choke on; reshapes take constants."""
    for graph in ("predictor", "refiner"):
        model = onnx.shape_inference.infer_shapes(model_of(tiny_engines, manifest, graph))
        integer = {
            value.name for value in model.graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.INT64
        }
        made = [node.op_type for node in model.graph.node if set(node.output) & integer and node.op_type != "Constant"]
        assert len(made) <= 6, made


def test_the_trunk_holds_at_most_seven_tenths_of_the_weights(
    tiny_engines: Path, manifest: Manifest, golden_s: Golden
) -> None:
    whole = sum(4 * parameter.numel() for parameter in golden_s.predictor.parameters())
    trunk = count_initializer_bytes(model_of(tiny_engines, manifest, "predictor"))
    conditioning = count_initializer_bytes(model_of(tiny_engines, manifest, "conditioning"))
    assert trunk / whole <= 0.70
    assert (trunk + conditioning) / whole == pytest.approx(
        1, abs=0.06
    )  # each weight once; positions and constants besides
    assert trunk == manifest.find_graph("predictor", 32, "fp32").weight_bytes  # type: ignore[union-attr]


def test_unused_variance_channels_are_cut_off(tiny_engines: Path, manifest: Manifest, golden_s: Golden) -> None:
    assert golden_s.predictor.config.learned_sigma
    shapes = {tuple(tensor.dims) for tensor in model_of(tiny_engines, manifest, "predictor").graph.initializer}
    assert (96, 16) in shapes | {shape[::-1] for shape in shapes}  # 2·2·4 outputs, not 2·2·8
    assert not {(96, 32), (32, 96)} & shapes


def test_the_decoder_scales_and_clamps(sessions: Mapping[str, Any], vae: Path, random: np.random.Generator) -> None:
    from flowturbo.models.vae import load_vae

    latents = random.standard_normal((3, 4, 16, 16), dtype=np.float32)
    latents[2, 0, 0, 0] = np.nan
    images, finite = sessions["decoder-small"].run(None, {"latents": latents})
    with torch.inference_mode():
        expected = load_vae(str(vae)).decode(torch.from_numpy(latents[:2]))
    assert measure_relative_difference(images[:2], expected) < 1e-5
    assert 0 <= images[:2].min() < images[:2].max() <= 1
    assert finite.tolist() == [1, 1, 0]


def test_zero_slots_with_zero_coefficients_stay_zero(sessions: Mapping[str, Any], manifest: Manifest) -> None:
    """An empty history: x_next = base + slope/2, and no error where there is no estimate."""
    rows = build_class_branches([1], [1.0], NULL, 4)
    spec = manifest.build_spec("predictor", 32)
    inputs = {
        name: np.zeros(tensor.resolve_shape({"B": 1, "N": 1}), tensor.numpy_dtype)
        for name, tensor in spec.inputs.items()
    }
    inputs |= {"row_image": rows.row_image, "mix": rows.mix, "atol": np.ones(1, np.float32)}
    inputs["base"][:] = 0.5
    inputs["point_coef"][0], inputs["update_coef"][0], inputs["update_coef"][HISTORY + 1] = 1, 1, 0.5
    slope, _, x_next, err, v_rms = sessions["predictor"].run(None, inputs)
    np.testing.assert_allclose(x_next, 0.5 + slope / 2, rtol=1e-6)
    assert err == 0
    assert v_rms[0] == pytest.approx(float(np.sqrt(np.mean(slope**2))), rel=1e-5)


def test_large_weights_lie_beside_the_graph_by_a_relative_name(
    tmp_path: Path, golden_nosigma: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.graphs.onnx_files.EXTERNAL_BYTES", 1000)
    network = make_deployable(resize_network(golden_nosigma.predictor, 4))
    spec = build_conditioning_spec(network.config.modulations)
    path = tmp_path / "here" / "conditioning.onnx"
    path.parent.mkdir()
    model = export_onnx(ConditioningGraph(network), spec, path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["conditioning.onnx", "conditioning.onnx.data"]
    places = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert places == {"conditioning.onnx.data"}
    assert path.stat().st_size < 100_000
    assert count_initializer_bytes(model) > 10 * path.stat().st_size  # counted without reading them
    moved = tmp_path / "there"
    path.parent.rename(moved)
    t, y = np.asarray([0.3], np.float32), np.asarray([7], np.int32)
    found = session(moved / "conditioning.onnx").run(None, {"t": t, "y": y})[0]
    assert (
        measure_relative_difference(
            found, network.conditioning(torch.from_numpy(t), torch.from_numpy(y).long()).detach()
        )
        < 1e-5
    )


def test_a_graph_that_breaks_the_contract_is_refused(tiny_engines: Path, manifest: Manifest) -> None:
    model = model_of(tiny_engines, manifest, "conditioning")
    spec = manifest.build_spec("conditioning", 32)
    check_graph(model, spec, "conditioning.onnx")
    model.graph.node[0].op_type = "Einsum"
    with pytest.raises(ProofError, match="holds Einsum"):
        check_graph(model, spec, "conditioning.onnx")
    model.graph.output[0].name = "other"
    with pytest.raises(ProofError, match="outputs"):
        check_graph(model, spec, "conditioning.onnx")
