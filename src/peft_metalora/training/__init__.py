# SPDX-License-Identifier: Apache-2.0
"""Both stages of training: `meta_train` makes a Down, `personalize` a subject (or, as the baseline, a plain LoRA).

`stage_settings` says what can be set; `examples` turns photos into latents and text, `stage_1` and `stage_2` say what
is trained, `engine` is the machinery under both, `watching` looks on. `encoder_training` is the phase between them.
"""
