"""steploop convert tf1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steploop.seq2seq import legacy, tf_cells

load_file = pytest.importorskip("safetensors.torch").load_file


def model_of(**options):
    cell = tf_cells.MultiRNNCell([tf_cells.BasicLSTMCell(4) for _ in range(2)])
    options = {"num_heads": 2, "backend": "reference", **options}
    return legacy.EmbeddingAttentionSeq2Seq(cell, 7, 6, 3, **options)


def saved(path, model, **more):
    np.savez(path, **{name.removesuffix(":0"): v for name, v in model.to_tf_variables().items()}, **more)
    return path


def test_the_file_loads_into_the_model(steploop, tmp_path):
    model = model_of()
    checkpoint, to = saved(tmp_path / "tf.npz", model), tmp_path / "model.safetensors"
    ran = steploop("convert", "tf1", checkpoint, "--to", to)
    assert ran.code == 0, ran.err
    assert "rnn/embedding_wrapper" in ran.out and "EmbeddingAttentionSeq2Seq, 24 variables" in ran.out
    other = model_of()
    other.load_state_dict(load_file(to), strict=True)
    inputs = torch.randint(7, (5, 3)), torch.randint(6, (4, 3))
    torch.testing.assert_close(other(*inputs), model(*inputs))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_weights_that_go_with_an_output_projection(steploop, tmp_path):
    projection = torch.randn(4, 6), torch.randn(6)
    model = model_of(output_projection=projection)
    to = tmp_path / "model.safetensors"
    ran = steploop("convert", "tf1", saved(tmp_path / "tf.npz", model), "--to", to)
    assert ran.code == 0, ran.err
    model_of(output_projection=projection).load_state_dict(load_file(to), strict=True)


def test_all_that_is_wrong_in_one_error_and_names_to_leave_out(steploop, tmp_path):
    model, to = model_of(), tmp_path / "model.safetensors"
    checkpoint = saved(tmp_path / "tf.npz", model, global_step=np.array(1), **{"a/Adam": np.zeros(3)})
    ran = steploop("convert", "tf1", checkpoint, "--to", to)
    assert ran.code == 2 and not to.exists()
    assert "unknown: global_step ()" in ran.err and "unknown: a/Adam (3,)" in ran.err
    assert "typer" not in ran.err
    ran = steploop("convert", "tf1", checkpoint, "--to", to, "--ignore", "*/Adam", "--ignore", "global_step")
    assert ran.code == 0 and to.exists() and "left out" in ran.out


def test_another_scope(steploop, tmp_path):
    model = model_of(scope="mine")
    checkpoint, to = saved(tmp_path / "tf.npz", model), tmp_path / "model.safetensors"
    ran = steploop("convert", "tf1", checkpoint, "--to", to)
    assert ran.code == 2 and "unknown: mine/rnn/" in ran.err and "scope=" in ran.err
    ran = steploop(
        "convert", "tf1", checkpoint, "--to", to, "--scope", "mine", "--function", "embedding_attention_seq2seq"
    )
    assert ran.code == 0, ran.err


def test_files_that_are_none(steploop, tmp_path):
    for name, content in (("no.npz", None), ("text.npz", b"hello"), ("array.npz", np.zeros(3))):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            with open(path, "wb") as stream:
                np.save(stream, content)
        ran = steploop("convert", "tf1", path, "--to", tmp_path / "out")
        assert ran.code == 2 and name in ran.err, ran.err
