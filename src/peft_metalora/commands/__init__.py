# SPDX-License-Identifier: Apache-2.0
"""What the subcommands of `metalora` do; `cli` makes their flags."""
