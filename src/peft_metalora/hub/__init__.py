# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects from local folders and the Hugging Face Hub, and back to it."""

from __future__ import annotations

from .loading import Location, load_down, load_subject, locate
from .publishing import pull, push_down, push_subject

__all__ = ["Location", "load_down", "load_subject", "locate", "pull", "push_down", "push_subject"]
