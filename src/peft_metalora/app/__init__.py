# SPDX-License-Identifier: Apache-2.0
"""A page in the browser: people from photos, pictures of them, and a library of who is there."""
