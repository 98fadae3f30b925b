# SPDX-License-Identifier: Apache-2.0
"""Comparing methods over many people: the same images, steps and seeds for all, scored by the same metrics."""
