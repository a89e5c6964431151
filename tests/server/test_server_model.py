"""What the server says of its model."""

import torch
from server_real import lively_model

from puna.serve.run import fingerprint


def test_fingerprint_follows_the_weights(tiny_processor):
    one, same = lively_model(tiny_processor), lively_model(tiny_processor)
    before = fingerprint(one)
    assert before == fingerprint(same) and len(before) == 64
    with torch.no_grad():
        one.norm.weight[0] += 1
    assert fingerprint(one) != before
