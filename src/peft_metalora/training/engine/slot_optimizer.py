# SPDX-License-Identifier: Apache-2.0
"""An optimiser for parameters whose first dimension is a subject's slot.

Mid (slots, r, meta_r) and Up (slots, d_out, r) hold many subjects, and a batch holds some of them. An ordinary Adam
would move the others too, by momentum and by weight decay. `SlotOptimizer` gives each slot an optimiser of its own, so
that a slot is trained exactly as if it were a separate adapter: its own moments, its own step count, nothing at all
when it is not in the batch. Parameters without slots (Down) have an ordinary optimiser beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...errors import ConfigError, SubjectIndexError

# These treat every number by itself, so that a slot's tensors can be one flat vector: one small update a slot instead
# of one for each of its tensors, with the same result.
_ELEMENTWISE = tuple(
    getattr(torch.optim, name) for name in ("Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
)


class SlotOptimizer(Optimizer):
    """One torch optimiser for each slot, and one for the parameters that all slots share.

    ```python
    optimizer = SlotOptimizer(torch.optim.AdamW, [mid, up], shared=[down], lr=1e-3, shared_options={"lr": 1e-4})
    optimizer.zero_grad()
    optimizer.see([0, 3])  # the subjects of this batch
    loss.backward()
    optimizer.step()  # slots 0 and 3 and Down move; all others keep every bit
    ```

    Args:
        optimizer_class: any `torch.optim.Optimizer`.
        parameters: each (slots, ...), the same number of slots in all.
        shared: parameters without slots; their group is `param_groups[1]`.
        shared_options: options of `shared` that differ from `options`.
        options: keyword arguments of `optimizer_class`.

    Learning-rate schedulers work on `param_groups` as with any optimiser.

    Raises:
        ConfigError: parameters with different numbers of slots, or none.
    """

    def __init__(
        self,
        optimizer_class: type[Optimizer],
        parameters: Iterable[nn.Parameter],
        *,
        shared: Iterable[nn.Parameter] = (),
        shared_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        slotted, shared = list(parameters), list(shared)
        counts = {parameter.shape[0] for parameter in slotted}
        if len(counts) != 1:
            raise ConfigError(
                "expected parameters with one common number of slots (their first dimension), "
                f"found {sorted(counts) or 'no parameter'}: pass the Mid and Up of one adapter"
            )
        self.num_slots = counts.pop()
        self._class, self._options = optimizer_class, options
        self._slotted = slotted
        self._sizes = [parameter[0].numel() for parameter in slotted]
        self._flat = optimizer_class in _ELEMENTWISE
        self._rows = torch.cat([parameter.detach().flatten(1) for parameter in slotted], dim=1)
        self._pieces = list(self._rows.split(self._sizes, dim=1))
        self._places: list[int] = []
        self._views_of_parameters: list[torch.Tensor] = []
        self._grads: torch.Tensor | None = None  # clipped, until the next step
        self._optimizers: dict[int, Optimizer] = {}
        self._seen: set[int] = set()
        groups: list[dict[str, Any]] = [{"params": slotted, "lr": options["lr"]}]
        self._shared: Optimizer | None = None
        if shared:
            self._shared = optimizer_class(shared, **{**options, **(shared_options or {})})
            groups.append({"params": shared, "lr": self._shared.param_groups[0]["lr"]})
        super().__init__(groups, {"lr": options["lr"], "fused": options.get("fused", False)})

    found_inf: torch.Tensor | None = None
    """1 on the device: the next `step` of fused optimisers leaves everything as it is (as in PyTorch's own)."""

    def see(self, slots: Sequence[int] | torch.Tensor) -> None:
        """Say which slots the batch holds; they, and only they, move in the next `step`.

        Slots of several calls since the last `step` or `zero_grad` add up, as gradients do.

        Raises:
            SubjectIndexError: a slot outside 0 .. num_slots - 1.
        """
        found = {int(slot) for slot in slots}
        if not found <= set(range(self.num_slots)):
            raise SubjectIndexError(
                f"expected slots 0 to {self.num_slots - 1}, found {sorted(found)}. Raise num_slots."
            )
        self._seen |= found

    def reset(self, slots: Iterable[int] | None = None) -> None:
        """Forget the state of `slots` (None: of all) and take their numbers anew from the parameters.

        To be called whenever something else than this optimiser wrote into the slots.
        """
        for slot in range(self.num_slots) if slots is None else slots:
            self._optimizers.pop(slot, None)
            self._seen.discard(slot)
            self._rows[slot] = torch.cat([parameter.detach()[slot].flatten() for parameter in self._slotted])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, those that were clipped too, and whose they are: a step that was interrupted is over."""
        self._grads = None
        self._seen.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clip the gradient of each slot by its own norm for the next `step`, and of the shared parameters by theirs.

        The `grad` of slotted parameters stays as it is: `step` takes the clipped numbers from here.

        Returns:
            (num_slots,) norms before clipping; zero for slots without a gradient.
        """
        self._grads = self._gradients()
        norms = torch.zeros(self.num_slots, device=self._rows.device)
        if self._grads is not None:
            norms = self._grads.norm(dim=1)
            self._grads *= (max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None]
        if self._shared is not None:
            nn.utils.clip_grad_norm_(self.param_groups[1]["params"], max_norm)
        return norms

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the seen slots and the shared parameters that have a gradient; then nothing is seen."""
        if self._shared is not None:
            self._shared.param_groups[0]["lr"] = self.param_groups[1]["lr"]
            self._shared.found_inf = self.found_inf  # type: ignore[attr-defined]
            self._shared.step()
        grads = self._gradients() if self._grads is None else self._grads
        if self._seen and grads is not None:
            live = [parameter.grad is not None for parameter in self._slotted]
            for slot in sorted(self._seen):
                self._step_slot(slot, grads[slot], live)
            # Slots that were not seen get the numbers that they have.
            torch._foreach_copy_(self._flat_parameters(), self._pieces)
        self._seen.clear()
        self._grads = None

    def _gradients(self) -> torch.Tensor | None:
        """All gradients as (num_slots, numbers of a slot), zero where a parameter has none; None if none has any.

        One tensor for clipping and stepping: hundreds of small ones would take the host longer than the GPU.
        """
        if all(parameter.grad is None for parameter in self._slotted):
            return None
        pieces = [
            self._rows.new_zeros(self.num_slots, size) if parameter.grad is None else parameter.grad.flatten(1)
            for parameter, size in zip(self._slotted, self._sizes, strict=True)
        ]
        return torch.cat(pieces, dim=1).to(self._rows.dtype)

    def _flat_parameters(self) -> list[torch.Tensor]:
        """The parameters as (num_slots, numbers of a slot), made anew only when somebody has moved or cast them."""
        places = [parameter.data_ptr() for parameter in self._slotted]
        if places != self._places:
            self._places = places
            self._views_of_parameters = [parameter.detach().view(self.num_slots, -1) for parameter in self._slotted]
        return self._views_of_parameters

    def _step_slot(self, slot: int, grad: torch.Tensor, live: list[bool]) -> None:
        if slot not in self._optimizers:
            self._optimizers[slot] = self._class(self._views(slot), **self._options)
        optimizer = self._optimizers[slot]
        group = optimizer.param_groups[0]
        group["lr"] = self.param_groups[0]["lr"]
        optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        if self._flat:
            group["params"][0].grad = grad
        else:
            for proxy, piece, alive in zip(group["params"], grad.split(self._sizes), live, strict=True):
                proxy.grad = piece.view(proxy.shape) if alive else None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _views(self, slot: int) -> list[nn.Parameter]:
        row = self._rows[slot]
        if self._flat:
            return [nn.Parameter(row)]
        return [
            nn.Parameter(piece.view(parameter.shape[1:]))
            for parameter, piece in zip(self._slotted, row.split(self._sizes), strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the parameters themselves."""
        return {
            "lr": [group["lr"] for group in self.param_groups],
            "slots": {slot: optimizer.state_dict() for slot, optimizer in self._optimizers.items()},
            "shared": self._shared.state_dict() if self._shared is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a `state_dict`; the parameters must have been restored before."""
        self.reset()
        for slot, state in state_dict["slots"].items():
            self._optimizers[slot] = self._class(self._views(slot), **self._options)
            self._optimizers[slot].load_state_dict(state)
        if self._shared is not None:
            self._shared.load_state_dict(state_dict["shared"])
        for group, lr in zip(self.param_groups, state_dict["lr"], strict=True):
            group["lr"] = lr
