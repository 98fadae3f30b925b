# SPDX-License-Identifier: Apache-2.0
"""A service of many people on a few copies of a base: who may ask, who is drawn in which batch, who is deleted."""
