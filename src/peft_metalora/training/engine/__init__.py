# SPDX-License-Identifier: Apache-2.0
"""The machinery of a run: loop, sampler, optimisers, processes, state; the same for both stages."""
