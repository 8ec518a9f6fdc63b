"""WebDataset's tars, by an index that says where each member begins, so that any sample is one read away."""

import json
from collections.abc import Sequence

from clip_jax.errors import BadSample, UserError
from clip_jax.files import expand, read_ranges
from clip_jax.records import PICTURES, Place, Record, missing_field, unreadable
from clip_jax.records.tar_cache import open_index


class Tars:
    """The samples of all shards that a pattern names.

    Fields are WebDataset's: the end of a member's name, after the first dot.  Besides, `image` is the first picture of
    a sample, `caption` its .txt, and what its .json holds is a field too, where no member has that name.
    """

    def __init__(self, pattern: str, fields: Sequence[str]):
        self.shards, self.fields = expand(pattern), tuple(fields)
        self.index = open_index(self.shards)
        self.broken = [
            (Place(self.shards[shard], f"sample {key}"), reason, f"{self.shards[shard]} sample {key}: {message}")
            for shard, key, reason, message in self.index.broken
        ]
        if not len(self):
            raise UserError(f"data set {pattern}: expected at least one sample, found none in {len(self.shards)} shards")

    def __len__(self) -> int:
        return len(self.index.starts) - 1

    def read(self, indices: Sequence[int]) -> list[Record | BadSample]:
        wanted: list[dict[str, int]] = [self._wanted(int(i)) for i in indices]
        parts = [self._part(member) for members in wanted for member in members.values()]
        found = iter(read_ranges(parts))
        return [self._record(int(i), {name: next(found) for name in members}) for i, members in zip(indices, wanted)]

    def place(self, index: int) -> Place:
        shard = self.shards[self.index.shards[self.index.starts[index]]]
        return Place(shard, f"sample {self.index.key(index)}")

    def _members(self, index: int) -> dict[str, int]:
        """The members of a sample, by their endings."""
        start, end = self.index.starts[index : index + 2].tolist()
        return {self.index.endings[e]: start + i for i, e in enumerate(self.index.member_endings[start:end].tolist())}

    def _wanted(self, index: int) -> dict[str, int]:
        """The members that hold the fields, by field; `.json` once, for all that have no member."""
        members, wanted = self._members(index), {}
        for field in self.fields:
            names = {"image": PICTURES, "caption": ("caption", "txt", "text")}.get(field, (field,))
            member = next((members[name] for name in names if name in members), None)
            if member is not None:
                wanted[field] = member
            elif "json" in members:
                wanted[".json"] = members["json"]
        return wanted

    def _part(self, member: int) -> tuple[str, int, int]:
        index = self.index
        return self.shards[index.shards[member]], int(index.offsets[member]), int(index.sizes[member])

    def _record(self, index: int, found: dict[str, bytes | Exception]) -> Record | BadSample:
        place = self.place(index)
        for data in found.values():
            if isinstance(data, Exception):
                return unreadable(place, data)
        if ".json" in found:
            try:
                values = json.loads(found.pop(".json"))
                found = {field: values[field] for field in self.fields if values.get(field) is not None} | found
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                return BadSample("bad json", f"{place}: its .json is not a JSON object in UTF-8 ({error})")
        picture, *others = self.fields
        missing = [picture] if picture not in found else others[:1] if len(found) == 1 else []
        if missing:
            return missing_field(place, missing[0], sorted({*self._members(index), *found}))
        return found

