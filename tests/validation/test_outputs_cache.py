"""Outputs of a model with a cache: the mask covers keys in the cache as well, the scores new tokens alone."""

import numpy as np

from onnxcomp.validation.outputs import View


def test_a_mask_over_the_cache_says_what_of_the_new_tokens_is_real():
    view = View({"tokens": "ids", "mask": "mask"}, 40, ())
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    seen = view.visible({"ids": np.ones((2, 3), np.int64), "mask": mask})
    assert np.array_equal(seen, [[True, True, True], [False, False, True]])
    assert np.array_equal(view.visible({"ids": np.ones((2, 5), np.int64), "mask": mask}), mask != 0)
