# SPDX-License-Identifier: Apache-2.0
"""Both stages of training: `meta_train` makes a Down, `personalize` a subject (or, as the baseline, a plain LoRA).

`settings` says what can be set, `bases` what a family of base models needs, `examples` encodes photos once, `slots` and
`loop` are the optimiser and the loop that both stages share.
"""
