# SPDX-License-Identifier: Apache-2.0
"""From photos and captions to what is trained on: views, latents, batches."""
