"""The games of a split, ALFWorld's own or generated ones, in a fixed order and with a digest.

A data folder holds `train`, `valid_seen`, `valid_unseen` and, for evaluations while training,
`valid_train`, directly or inside `json_2.1.1` as `alfworld-download` leaves them. Each split has a
folder for each game, with `game.tw-pddl` and `traj_data.json`. The same games count as in ALFWorld
(Shridhar et al., 2021, arXiv:2010.03768): those of the six task types, known to be solvable,
without sliced objects and without movable receptacles.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from opd_jax.runtime.files import local_path, replace_text

DEV = "valid_train"  # more games in the rooms of train, which no table reports
SPLITS = ("train", "valid_seen", "valid_unseen", DEV)
TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
# Number of games in ALFWorld's evaluation splits. A benchmark figure needs all of them; training
# may use any part of its games.
OFFICIAL_SIZES = {"valid_seen": 140, "valid_unseen": 134}

VARIABLE = "ALFWORLD_DATA"
GAME_FILE = "game.tw-pddl"
TASK_FILE = "traj_data.json"
# The key that marks generated game files. TextWorld ignores it.
GENERATED = "generated"
_REMEDY = (
    "run `alfworld-download` or `python -m opd_jax.envs.alfworld.games`, and name the folder in "
    f"`data` or in the environment variable {VARIABLE}"
)


@dataclass(frozen=True)
class Game:
    """One game on disk.

    Attributes:
      id: `alfworld/SPLIT/TASK/TRIAL`, or `alfworld-generated/...` for a generated game; the same
        on every machine.
      type: one of `TASK_TYPES`.
      path: the `game.tw-pddl` file.
      generated: the game is not ALFWorld's own.
      state: times, sizes and inodes of its files when they were read.
    """

    id: str
    type: str
    path: Path
    generated: bool
    state: str = field(compare=False)


def data_folder(data: str) -> Path:
    """The folder with the splits.

    Args:
      data: a folder; "" for the environment variable `ALFWORLD_DATA`.

    Raises:
      ValueError: no folder is named, or it holds no split.
    """
    name = data or os.environ.get(VARIABLE, "")
    if not name:
        raise ValueError(f"`data`: expected a folder with ALFWorld games, got none; {_REMEDY}")
    root = local_path(name, name="data")
    for folder in (root / "json_2.1.1", root):
        if any((folder / split).is_dir() for split in SPLITS):
            return folder.resolve()
    raise ValueError(
        f"`data`: expected a folder that holds {', '.join(SPLITS)}, got {str(root)!r}; {_REMEDY}"
    )


@functools.cache
def panel(folder: Path, split: str) -> tuple[Game, ...]:
    """The games of a split, ordered by the SHA-256 of their ids.

    So the order is the same on every machine, and the first few games are a fair sample of task
    types and rooms.

    Args:
      folder: see `data_folder`.
      split: one of `SPLITS`.

    Raises:
      ValueError: the split is unknown, a game file cannot be read, or ALFWorld's own `valid_seen`
        or `valid_unseen` is not complete.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}; got {split!r}.")
    return _in_order(_find(folder, split), folder, split)


def game(folder: Path, split: str, index: int) -> Game:
    """Game `index` of `panel`. Looks at no other game if the panel has been read on this machine.

    A run reads the panels when it starts. Its workers then need the list and the games they play.

    Raises:
      ValueError: there is no such game, or as in `panel`.
    """
    games = listed(folder, split)
    if not 0 <= index < len(games) or games[index].state != _state(games[index].path):
        games = panel(folder, split)
    if not 0 <= index < len(games):
        raise ValueError(
            f"`index` must be from 0 to {len(games) - 1} for split {split!r}; got {index}."
        )
    return games[index]


@functools.cache
def listed(folder: Path, split: str) -> tuple[Game, ...]:
    """The panel as its last reader on this machine left it; () if nobody has."""
    _, found = _load(folder, split)
    return _in_order(found, folder, split)


def _in_order(found: list[Game], folder: Path, split: str) -> tuple[Game, ...]:
    games = tuple(sorted(found, key=lambda game: _sha256(game.id)))
    expected = OFFICIAL_SIZES.get(split, len(games))
    if games and len(games) != expected and not all(game.generated for game in games):
        raise ValueError(
            f"`data`: expected the {expected} games of ALFWorld's {split}, got {len(games)} in "
            f"{str(folder / split)!r}; run `alfworld-download` again, or mark games of your own "
            f'with "{GENERATED}": true in their {GAME_FILE}'
        )
    return games


def digest(games: tuple[Game, ...]) -> str:
    """SHA-256 over ids, types and game files of a panel; `generated-` before it if any game is.

    Ids alone would not do: they are names of folders, which other downloads may use, too.
    """
    label = "generated-" if any(game.generated for game in games) else ""
    lines = (
        f"{game.id} {game.type} {hashlib.sha256(game.path.read_bytes()).hexdigest()}\n"
        for game in games
    )
    return label + _sha256("".join(lines))


def _find(folder: Path, split: str) -> list[Game]:
    """The games of a split in any order.

    To read thousands of files takes many seconds, and each worker needs the list. So the first
    reader leaves it in a file of the machine's temporary folder. It counts while no game file is
    added, removed, written or replaced.
    """
    paths = sorted((folder / split).rglob(GAME_FILE))
    if split == DEV:  # whatever a download holds, none is trained on
        train = folder / "train"
        paths = [p for p in paths if not (train / p.relative_to(folder / split)).exists()]
    state = _sha256(str([(str(path), _state(path)) for path in paths]))
    known, games = _load(folder, split)
    if known == state:
        return games
    found = [game for path in paths if (game := _read(path, path.parent.relative_to(folder)))]
    lines = [(game.id, game.type, str(game.path), game.generated, game.state) for game in found]
    stored = _list_file(folder, split)
    with contextlib.suppress(OSError):  # then the next reads them too
        stored.parent.mkdir(mode=0o700, exist_ok=True)
        replace_text(stored, json.dumps({"state": state, "games": lines}))
    return found


def _load(folder: Path, split: str) -> tuple[str, list[Game]]:
    """The state of all game files, and the games, as the last reader left them; else ("", [])."""
    stored = _list_file(folder, split)
    try:
        if stored.parent.stat().st_uid == os.getuid():
            known = json.loads(stored.read_text("utf-8"))
            games = [Game(i, kind, Path(path), *rest) for i, kind, path, *rest in known["games"]]
            return known["state"], games
    except (OSError, ValueError, LookupError, TypeError):
        pass  # nobody has read them, or something else lies there
    return "", []


def _list_file(folder: Path, split: str) -> Path:
    ours = Path(tempfile.gettempdir()) / f"opd_jax-{os.getuid()}"
    return ours / f"alfworld-{_sha256(str(folder / split))}.json"


def _state(path: Path) -> str:
    """Time, size and inode of both files of the game at `path`."""
    found = []
    for file in (path, path.parent / TASK_FILE):
        with contextlib.suppress(FileNotFoundError):
            stat = file.stat()
            found.append((file.name, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return str(found)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, place: Path) -> Game | None:
    """The game at `path`, `place` below the data folder; None for one that does not count."""
    if "movable" in str(place) or "Sliced" in str(place):
        return None
    state = _state(path)  # before it is read: what is written meanwhile changes it
    try:
        task_type = json.loads((path.parent / TASK_FILE).read_text("utf-8"))["task_type"]
        game = json.loads(path.read_text("utf-8"))
        solvable, generated = game.get("solvable", False), bool(game.get(GENERATED, False))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`data`: cannot read {GAME_FILE} with {TASK_FILE} in {str(path.parent)!r} "
            f"({type(error).__name__}: {error}); write or download that game again"
        ) from None
    if task_type not in TASK_TYPES or not solvable:
        return None
    name = "alfworld-generated" if generated else "alfworld"
    return Game(f"{name}/{place.as_posix()}", task_type, path, generated, state)
