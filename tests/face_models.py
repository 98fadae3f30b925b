# SPDX-License-Identifier: Apache-2.0
"""Small ONNX models that insightface takes for a face detector and a recogniser.

An image is seen as 4 x 4 tiles. A tile is a face where its red is bright; the more blue it has, the larger its box; the
face's embedding is the mean colour of its aligned crop. The detector has SCRFD's nine outputs (scores, boxes and five
landmarks at strides 8, 16 and 32, two anchors a place), of which only stride 32 ever answers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE, TILE, ANCHORS = 128, 32, 2
# Where ArcFace's alignment puts eyes, nose and mouth in a 112 x 112 crop: with these landmarks the crop is the tile.
_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def write_pack(folder: Path, batch: int | str = 1) -> Path:
    """Write a detector and a recogniser into a folder that `FaceAnalysis` accepts as a pack.

    Args:
        batch: faces that the recogniser takes at once; a name for any number, as in antelopev2 and buffalo_l.
    """
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(_detector(), folder / "det.onnx")
    onnx.save(_recogniser(batch), folder / "rec.onnx")
    return folder


def _detector() -> onnx.ModelProto:
    constants = {
        "red": np.array([[1.0], [0], [0]]),
        "blue": np.array([[0.0], [0], [1]]),
        "tiles": np.array([3, 16], dtype=np.int64),
        "column": np.array([-1, 1], dtype=np.int64),
        "four": np.array([-1, 4], dtype=np.int64),
        "nothing": np.zeros((16, 2)),
        "slope": np.array([0.25]),
        "offset": np.array([0.5]),
    }
    nodes = [
        helper.make_node("AveragePool", ["image"], ["pooled"], kernel_shape=[TILE, TILE], strides=[TILE, TILE]),
        helper.make_node("Reshape", ["pooled", "tiles"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["colours"], perm=[1, 0]),
        helper.make_node("MatMul", ["colours", "red"], ["score"]),
        helper.make_node("Concat", ["score"] * ANCHORS, ["score_pairs"], axis=1),
        helper.make_node("Reshape", ["score_pairs", "column"], ["score_32"]),
        helper.make_node("MatMul", ["colours", "blue"], ["amount"]),
        helper.make_node("Mul", ["amount", "slope"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["length"]),
        helper.make_node("Concat", ["nothing", "length", "length"] * ANCHORS, ["box_pairs"], axis=1),
        helper.make_node("Reshape", ["box_pairs", "four"], ["bbox_32"]),
    ]
    marks = (_TEMPLATE / 112).reshape(1, 10)
    outputs = []
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            name, places = f"{kind}_{stride}", ANCHORS * (SIDE // stride) ** 2
            if stride != 32 or kind == "kps":
                constants[f"{name}_value"] = np.tile(marks, (places, 1)) if kind == "kps" else np.zeros((places, width))
                nodes.append(helper.make_node("Identity", [f"{name}_value"], [name]))
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [places, width]))
    return _model("detector", nodes, constants, [1, 3, SIDE, SIDE], outputs)


def _recogniser(batch: int | str) -> onnx.ModelProto:
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [batch, 3])
    return _model("recogniser", nodes, {}, [batch, 3, 112, 112], [output])


def _model(
    name: str,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    shape: list[int | str],
    outputs: list[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    stored = [
        numpy_helper.from_array(value if value.dtype == np.int64 else value.astype(np.float32), key)
        for key, value in constants.items()
    ]
    graph = helper.make_graph(
        nodes, name, [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)], outputs, stored
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model
