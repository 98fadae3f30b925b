# SPDX-License-Identifier: Apache-2.0
"""A service of many people on copies of a base: who may ask, who is drawn in which batch, who is deleted."""
