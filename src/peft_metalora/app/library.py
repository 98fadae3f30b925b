# SPDX-License-Identifier: Apache-2.0
"""Who is there: the people of a user, kept as `metalora serve` keeps those of a tenant; and photos that were asked for.

    index/, people/                 as `service.people` has them
    photos/<tenant>/<name>/1 ...    photos of somebody, where whoever brought them in ticked that box

One library is shared by all tabs and users of a name: what one changes, the other finds changed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bases.generic import named_class
from ..checkpoint.space import CodeSource
from ..checkpoint.writing import save_read_subject
from ..errors import ConfigError, OutputExistsError, WriteFailedError
from ..files import temporary_folder
from ..hub.publishing import push_subject
from ..lora.export import export_subject
from ..service.people import People, Person, Place
from ..service.tenants import NAME
from .studio import Studio

MOST_SHOWN = 1000


class Library:
    """The people of all users. Methods may be called in any thread.

    Raises:
        As `People`.
    """

    def __init__(self, place: Place, studio: Studio) -> None:
        if place.read_only:
            raise ConfigError(
                "expected a place for people where they can be deleted for good, found one with a history: give "
                "people=<a folder>"
            )
        self._place, self._people, self._studio = place, People(place), studio
        self._change = threading.Lock()

    def people(self, tenant: str) -> list[Person]:
        """Everybody of a user, in order of their names."""
        return self._people.page(tenant, limit=MOST_SHOWN)

    def person(self, tenant: str, name: str | None) -> Person:
        """Somebody of a user; raises ConfigError."""
        found = self._people.find(tenant, name) if name else None
        if found is None:
            raise ConfigError(f"expected somebody of your library, found {repr(name) if name else 'nobody chosen'}")
        return found

    def require_here(self, people: Sequence[Person]) -> None:
        """Raises ConfigError where one of them was deleted since they were looked up, or goes by another name."""
        for person in people:
            now = self._people.entry(person.tenant, person.name)
            if now is None or now.uid != person.uid:
                raise ConfigError(
                    f"expected somebody of your library, found {person.name}, who was deleted or renamed meanwhile"
                )

    def require_new(self, tenant: str, name: str) -> None:
        """Raises ConfigError of a name that cannot be, OutputExistsError of one that is taken."""
        if not re.fullmatch(NAME, name or ""):
            raise ConfigError(
                f"expected a name of up to 64 letters, digits, '_' and '-', found {name!r:.80}: give another name"
            )
        if self._people.find(tenant, name) is not None:
            raise OutputExistsError(f"expected a new name, found {name}, which is taken: give another, or delete them")

    def enrol(self, person: Person, photos: Sequence[bytes] = (), between: Sequence[Person] = ()) -> Person:
        """Keep somebody whom nobody knows yet, as a code.

        Args:
            photos: those to be kept. between: whom they are a blend of, who have to be here.

        Raises:
            ConfigError, OutputExistsError: as `require_new` and `require_here`. WriteFailedError: nobody was added.
        """
        with self._change:
            self.require_new(person.tenant, person.name)
            self.require_here(between)
            own: dict[str, Any] = {"down": person.down, "space": person.space, "consent": person.consent}
            # Entered before their photos are kept, so that no photo is without a name to delete it by.
            added = self._people.put_code(person.tenant, person.name, person.code or b"", **own)
            try:
                self._write_photos(added, photos)
            except BaseException:
                self._people.remove(added)
                raise
            return added

    def polished(self, person: Person, files: dict[str, bytes]) -> Person:
        """Keep somebody as they are after polishing.

        Raises:
            ConfigError: they have changed, or have gone, meanwhile. WriteFailedError. They stay what they are.
        """
        with self._change:
            if self._people.entry(person.tenant, person.name) != person:
                raise ConfigError(f"expected {person.name} as they were, found that they have changed meanwhile")
            return self._people.put_files(person, files)

    def rename(self, tenant: str, name: str | None, to: str) -> Person:
        """Call somebody by another name; raises as `person` and `require_new`, and WriteFailedError."""
        with self._change:
            person = self.person(tenant, name)
            self.require_new(tenant, to)
            return self._people.rename(person, to)

    def delete(self, tenant: str, name: str | None) -> Person:
        """Delete somebody, their photos first; raises as `person` and `People.remove`: delete again."""
        with self._change:
            # Whose files have gone cannot be shown any more, but is entered, and may have photos.
            person = (self._people.entry(tenant, name) if name else None) or self.person(tenant, name)
            self._people.remove(person)
            return person

    # Files of somebody

    def photos(self, person: Person) -> list[bytes]:
        """The photos that were kept; none where nobody asked for that."""
        folder = self._place.photos(person)
        if not self._place.fs.exists(folder):
            return []
        paths = sorted(self._place.fs.ls(folder, detail=False))
        return [self._place.fs.cat_file(path) for path in paths]

    def export(self, person: Person, folder: Path, format: str) -> Path:
        """Write somebody as an ordinary LoRA into a folder of their own; raises as `export_subject`."""
        return export_subject(
            self._studio.subject(person), folder / f"{person.name}.safetensors", format, overwrite=True
        )

    def push(self, person: Person, repo_id: str, down: str | None, overwrite: bool) -> str:
        """Publish somebody, for nobody but their owner to see; returns the commit.

        Args:
            down: repository of the Down, where the page has it from a folder. overwrite: as of `push_subject`.

        Raises:
            As `push_subject`.
        """
        with temporary_folder() as made:
            if person.code is None:
                with self._place.files(person) as files:
                    return push_subject(files, repo_id, private=True, down=down, overwrite=overwrite)
            source = self._studio.subject(person)
            assert isinstance(source, CodeSource)
            saved = save_read_subject(made / person.name, source, facts=named_class(self._studio.base) or None)
            return push_subject(saved, repo_id, private=True, down=down, overwrite=overwrite)

    def _write_photos(self, person: Person, photos: Sequence[bytes]) -> None:
        try:
            for number, photo in enumerate(photos, 1):
                self._place.write(f"{self._place.photos(person)}/{number:03}", photo)
        except (OSError, WriteFailedError) as error:
            raise WriteFailedError(
                f"expected to be able to keep the photos of {person.name}, found: {error}"
            ) from error
