# SPDX-License-Identifier: Apache-2.0
"""An optimiser for parameters whose first dimension is a subject's slot.

Mid (slots, r, meta_r) and Up (slots, d_out, r) hold many subjects, and a batch holds some of them. An ordinary Adam
would move the others too, by momentum and by weight decay. `SlotOptimizer` gives each slot an optimiser of its own, so
that a slot is trained exactly as if it were a separate adapter: its own moments, its own step count, nothing at all
when it is not in the batch. Parameters without slots (Down) have an ordinary optimiser beside them.

Most optimisers of torch treat every number by itself. Then a slot's tensors are one flat vector, and the vectors of all
slots the parameters of one optimiser, which leaves those without a gradient alone: a step of any number of slots takes
the few kernels of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from ...bases import send
from ...errors import ConfigError, SubjectIndexError

_ELEMENTWISE = tuple(
    getattr(torch.optim, name) for name in ("Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
)


class SlotOptimizer(Optimizer):
    """A torch optimiser's step for each slot by itself, and for the parameters that all slots share.

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
        self._rows = torch.cat([parameter.detach().flatten(1) for parameter in slotted], dim=1)
        self._pieces = list(self._rows.split(self._sizes, dim=1))
        self._places: list[int] = []
        self._views_of_parameters: list[torch.Tensor] = []
        self._clipped: _Clipped | None = None  # until the next step
        self._vectors: list[nn.Parameter] = []
        self._joint: Optimizer | None = None  # of the vectors, where numbers are treated by themselves
        self._optimizers: dict[int, Optimizer] = {}  # else
        if optimizer_class in _ELEMENTWISE:
            self._vectors = [nn.Parameter(row) for row in self._rows]
            kernels = {} if options.get("fused") else {"foreach": True}
            self._joint = optimizer_class(self._vectors, **{**kernels, **options})
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
            if self._joint is not None:
                vector = self._vectors[slot]
                fresh = self._class([vector], **self._options).state.get(vector)  # some have a state from the start
                self._joint.state.pop(vector, None)
                if fresh:
                    self._joint.state[vector] = fresh
            self._seen.discard(slot)
            self._rows[slot] = torch.cat([parameter.detach()[slot].flatten() for parameter in self._slotted])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, those that were clipped too, and whose they are: a step that was interrupted is over."""
        self._clipped = None
        self._seen.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clip the gradient of each slot by its own norm for the next `step`, and of the shared parameters by theirs.

        The `grad` of slotted parameters stays as it is: `step` takes the clipped numbers from here.

        Returns:
            (num_slots,) norms before clipping; zero for slots that were not seen, if any was.
        """
        slots = sorted(self._seen) or list(range(self.num_slots))
        grads, norms = self._gradients(slots), torch.zeros(self.num_slots, device=self._rows.device)
        if grads is not None:
            own = _clip(grads, max_norm)
            norms = own if len(slots) == self.num_slots else norms.index_copy(0, self._index(slots), own)
            self._clipped = _Clipped(max_norm, slots, grads)
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
        if self._seen and (grads := self._clipped_gradients()) is not None:
            self._step_slots(sorted(self._seen), grads)
            # Slots that were not seen get the numbers that they have.
            torch._foreach_copy_(self._flat_parameters(), self._pieces)
        self._seen.clear()
        self._clipped = None

    def _clipped_gradients(self) -> torch.Tensor | None:
        """Those of the seen slots, clipped if that was asked for since the last step."""
        slots, clipped = sorted(self._seen), self._clipped
        if clipped is not None and clipped.slots == slots:
            return clipped.grads
        grads = self._gradients(slots)
        if clipped is not None and grads is not None:
            _clip(grads, clipped.max_norm)
        return grads

    def _gradients(self, slots: list[int]) -> torch.Tensor | None:
        """The gradients of slots as (slots, numbers of a slot), zero where a parameter has none; None if none has any.

        One tensor for clipping and stepping: hundreds of small ones would take the host longer than the GPU.
        """
        if all(parameter.grad is None for parameter in self._slotted):
            return None
        index = None if len(slots) == self.num_slots else self._index(slots)
        pieces = []
        for parameter, size in zip(self._slotted, self._sizes, strict=True):
            if parameter.grad is None:
                pieces.append(self._rows.new_zeros(len(slots), size))
            else:
                grad = parameter.grad if index is None else parameter.grad.index_select(0, index)
                pieces.append(grad.flatten(1))
        return torch.cat(pieces, dim=1).to(self._rows.dtype)

    def _index(self, slots: list[int]) -> torch.Tensor:
        return send(torch.tensor(slots), self._rows.device)

    def _flat_parameters(self) -> list[torch.Tensor]:
        """The parameters as (num_slots, numbers of a slot), made anew only when somebody has moved or cast them."""
        places = [parameter.data_ptr() for parameter in self._slotted]
        if places != self._places:
            self._places = places
            self._views_of_parameters = [parameter.detach().view(self.num_slots, -1) for parameter in self._slotted]
        return self._views_of_parameters

    def _step_slots(self, slots: list[int], grads: torch.Tensor) -> None:
        if self._joint is not None:
            for slot, grad in zip(slots, grads.unbind(), strict=True):
                self._vectors[slot].grad = grad
            self._run(self._joint)
            for slot in slots:
                self._vectors[slot].grad = None
            return
        live = [parameter.grad is not None for parameter in self._slotted]
        for slot, grad in zip(slots, grads.unbind(), strict=True):
            if slot not in self._optimizers:
                self._optimizers[slot] = self._class(self._tensors(slot), **self._options)
            optimizer = self._optimizers[slot]
            tensors = optimizer.param_groups[0]["params"]
            for tensor, piece, alive in zip(tensors, grad.split(self._sizes), live, strict=True):
                tensor.grad = piece.view(tensor.shape) if alive else None
            self._run(optimizer)
            optimizer.zero_grad(set_to_none=True)

    def _run(self, optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        optimizer.step()

    def _tensors(self, slot: int) -> list[nn.Parameter]:
        """A slot's part of each parameter, looking into its row."""
        return [
            nn.Parameter(piece.view(parameter.shape[1:]))
            for parameter, piece in zip(self._slotted, self._rows[slot].split(self._sizes), strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the parameters themselves; a slot's state as its own optimiser's."""
        slots = {slot: optimizer.state_dict() for slot, optimizer in self._optimizers.items()}
        if self._joint is not None:
            whole = self._joint.state_dict()
            groups = [{**group, "params": [0]} for group in whole["param_groups"]]
            slots = {slot: {"state": {0: state}, "param_groups": groups} for slot, state in whole["state"].items()}
        return {
            "lr": [group["lr"] for group in self.param_groups],
            "slots": slots,
            "shared": self._shared.state_dict() if self._shared is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a `state_dict`; the parameters must have been restored before."""
        self.reset()
        slots = state_dict["slots"]
        if self._joint is not None:
            groups = self._joint.state_dict()["param_groups"]
            if slots:
                saved = next(iter(slots.values()))["param_groups"]
                groups = [{**own, **other, "params": own["params"]} for own, other in zip(groups, saved, strict=True)]
            kernels = {name: self._joint.param_groups[0].get(name) for name in ("foreach", "fused")}
            state = {slot: own["state"][0] for slot, own in slots.items() if own["state"]}
            started = self._joint.state_dict()["state"]
            self._joint.load_state_dict({"state": {**started, **state}, "param_groups": groups})
            self._joint.param_groups[0].update(kernels)
        else:
            for slot, state in slots.items():
                self._optimizers[slot] = self._class(self._tensors(slot), **self._options)
                self._optimizers[slot].load_state_dict(state)
        if self._shared is not None:
            self._shared.load_state_dict(state_dict["shared"])
        for group, lr in zip(self.param_groups, state_dict["lr"], strict=True):
            group["lr"] = lr


class _Clipped(NamedTuple):
    """Gradients (slots, numbers of a slot) that are clipped, whose they are, and to which norm."""

    max_norm: float
    slots: list[int]
    grads: torch.Tensor


def _clip(grads: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Clip each row to a norm, in place; returns the norms (rows,) that they had."""
    norms = grads.norm(dim=1)
    grads *= (max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None]
    return norms
