"""Molecules as graphs, their scaffolds, and splits by scaffold. RDKit reads the SMILES (the extra `graphs`).

Features and splits are those of Hu et al. (ICLR 2020), whose networks are in models/graph_networks.py.
"""

from collections import defaultdict
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ..common.errors import UserError
from .packed_graphs import Graph

CHIRALITY = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW")  # there is no embedding for others
BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
DIRECTIONS = ("NONE", "ENDUPRIGHT", "ENDDOWNRIGHT")
LARGEST_ATOM = 118
TRAIN_SHARE, VAL_SHARE = 0.8, 0.1


def rdkit() -> ModuleType:
    """RDKit's module Chem, silent about SMILES that it cannot read. Raises UserError if it is not installed."""
    try:
        from rdkit import Chem, rdBase
    except ImportError:
        raise UserError("Molecules are read by RDKit: pip install 'delta-transfer[graphs]'") from None
    rdBase.DisableLog("rdApp.*")  # the caller counts and names them
    module: ModuleType = Chem
    return module


def read_molecule(smiles: str) -> Any:
    """RDKit's molecule. Raises ValueError that says why there is none."""
    molecule = rdkit().MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError("no valid molecule")
    if molecule.GetNumAtoms() == 0:
        raise ValueError("no atom")
    return molecule


def canonical(molecule: Any) -> str:
    """The SMILES that all spellings of a molecule share."""
    smiles: str = rdkit().MolToSmiles(molecule)
    return smiles


def graph_of(molecule: Any) -> Graph:
    """Atoms (atomic number - 1, chirality) and bonds (type, direction), each bond in both directions.

    Raises ValueError for an atom or a bond that the networks have no embedding for.
    """
    nodes = []
    for atom in molecule.GetAtoms():
        if not 1 <= atom.GetAtomicNum() <= LARGEST_ATOM:
            raise ValueError(f"an atom without an atomic number ({atom.GetSymbol()})")
        nodes.append((atom.GetAtomicNum() - 1, _place(CHIRALITY, atom.GetChiralTag(), "chirality")))
    ends, features = [], []
    for bond in molecule.GetBonds():
        first, second = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        of_bond = (_place(BONDS, bond.GetBondType(), "bond"), _place(DIRECTIONS, bond.GetBondDir(), "direction"))
        ends += [(first, second), (second, first)]
        features += [of_bond, of_bond]
    return (
        np.array(nodes, dtype=np.int64),
        np.array(ends, dtype=np.int64).reshape(-1, 2).T,
        np.array(features, dtype=np.int64).reshape(-1, 2),
    )


def _place(known: Sequence[str], value: Any, what: str) -> int:
    if value.name not in known:
        raise ValueError(f"the {what} {value.name}, which the networks do not know")
    return known.index(value.name)


def scaffold_of(molecule: Any) -> str:
    """The Bemis-Murcko scaffold as SMILES, with chirality; empty for a molecule without rings."""
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    scaffold: str = MurckoScaffoldSmiles(mol=molecule, includeChirality=True)
    return scaffold


def scaffold_split(scaffolds: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The validation and the test molecules, (N,) bool each, of the published deterministic split 8:1:1.

    Sets of molecules of one scaffold are taken in turn, the largest first, among equal ones the one that begins last.
    A set goes to training if that stays within 80 %, else to validation if both stay within 90 %, else to test.
    """
    sets = _sets_of(scaffolds)
    trained, validated = 0, 0
    val, test = np.zeros(len(scaffolds), dtype=bool), np.zeros(len(scaffolds), dtype=bool)
    for members in sorted(sets, key=lambda members: (len(members), members[0]), reverse=True):
        if trained + len(members) <= TRAIN_SHARE * len(scaffolds):
            trained += len(members)
        elif trained + validated + len(members) <= (TRAIN_SHARE + VAL_SHARE) * len(scaffolds):
            validated += len(members)
            val[members] = True
        else:
            test[members] = True
    return val, test


def random_scaffold_split(scaffolds: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for sets in random order: validation, then test, takes sets that keep it within 10 %."""
    sets, most = _sets_of(scaffolds), int(VAL_SHARE * len(scaffolds))
    val, test = np.zeros(len(scaffolds), dtype=bool), np.zeros(len(scaffolds), dtype=bool)
    for number in np.random.default_rng((seed, 6)).permutation(len(sets)):
        for held_out in (val, test):
            if held_out.sum() + len(sets[number]) <= most:
                held_out[sets[number]] = True
                break
    return val, test


def random_split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same split without scaffolds."""
    order, most = np.random.default_rng((seed, 7)).permutation(count), int(VAL_SHARE * count)
    return np.isin(np.arange(count), order[:most]), np.isin(np.arange(count), order[most : 2 * most])


def _sets_of(scaffolds: Sequence[str]) -> list[list[int]]:
    sets: dict[str, list[int]] = defaultdict(list)
    for index, scaffold in enumerate(scaffolds):
        sets[scaffold].append(index)
    return list(sets.values())
