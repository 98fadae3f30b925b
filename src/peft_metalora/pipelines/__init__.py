# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects on diffusers pipelines."""

from __future__ import annotations

from .loading import MetaLoraLoaderMixin, enable_meta_lora
from .table import SubjectTable

__all__ = ["MetaLoraLoaderMixin", "SubjectTable", "enable_meta_lora"]
