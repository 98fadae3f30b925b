# SPDX-License-Identifier: Apache-2.0
"""Ordinary LoRAs: subjects written as one for other tools, and one brought onto a Down."""
