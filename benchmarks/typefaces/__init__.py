# SPDX-License-Identifier: Apache-2.0
"""A second domain, from real data: typefaces. One glyph of a font is read, the whole alphabet is drawn."""
