# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Hub: Downs and subjects fetched from it or found in a local folder, and published with a card."""

from __future__ import annotations

from .loading import HubOptions, load, load_down, load_subject
from .publishing import pull, push_down, push_subject

__all__ = ["HubOptions", "load", "load_down", "load_subject", "pull", "push_down", "push_subject"]
