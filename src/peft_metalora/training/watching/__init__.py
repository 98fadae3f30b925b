# SPDX-License-Identifier: Apache-2.0
"""Looking at a run while it goes on: scores, pictures, trackers, when to stop."""
