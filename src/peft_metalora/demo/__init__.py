# SPDX-License-Identifier: Apache-2.0
"""The embedded demo domain: procedural faces, a small base model trained on them, and its judges."""
