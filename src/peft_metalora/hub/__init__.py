# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects from local folders and the Hugging Face Hub, and back to it."""

from __future__ import annotations

from .loading import HubOptions, load, load_down, load_subject
from .publishing import pull, push_down, push_subject

__all__ = ["HubOptions", "load", "load_down", "load_subject", "pull", "push_down", "push_subject"]
