"""The chemistry of a hospital's laboratory: items, units and the factors between them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.dka import comparable
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.files import InputError

GAP_ITEM = 50868
"""Item of the anion gap that the laboratory reports. Source: d_labitems of MIMIC-IV."""

COMPUTED_GAP = -1  # item of the computed anion gap, which MIMIC-IV does not have

GAP_COMPONENTS = (50983, 50902, 50882)
"""Serum sodium, chloride and bicarbonate: the gap is the first less the others."""

ALL_SERIES = "all"

CHEMISTRY = (
    Feature("anion gap", "mEq/L", (GAP_ITEM,), (-5.0, 60.0)),
    Feature("bicarbonate", "mEq/L", (50882,), (3.0, 60.0)),
    Feature("chloride", "mEq/L", (50902, 50806), (50.0, 160.0)),
    Feature("creatinine", "mg/dL", (50912,), (0.1, 30.0)),
    Feature("glucose", "mg/dL", (50931, 50809), (5.0, 2500.0)),
    Feature("lactate", "mmol/L", (50813,), (0.1, 40.0)),
    Feature("pH", "", (50820,), (6.5, 8.0)),
    Feature("potassium", "mEq/L", (50971, 50822), (1.0, 12.0)),
    Feature("sodium", "mEq/L", (50983, 50824), (90.0, 200.0)),
    Feature("urea nitrogen", "mg/dL", (51006,), (1.0, 300.0)),
)
"""Keys are MIMIC-IV's itemids: the serum's first, then the blood gas machine's.
Source: itemid and valueuom, d_labitems and labevents of MIMIC-IV."""

FACTORS = {
    "creatinine": {"mg/dl": 1.0, "umol/l": 0.011312},
    "glucose": {"mg/dl": 1.0, "mmol/l": 18.016},
    "lactate": {"mmol/l": 1.0, "mg/dl": 0.11101},
    "pH": {"units": 1.0, "ph": 1.0, "": 1.0},
    "urea nitrogen": {"mg/dl": 1.0, "mmol/l": 2.801},
}
"""Factors of units in small letters, to convert to the unit above; those of the others are
``EQUIVALENT``. Source: molar masses of glucose 180.16, creatinine 113.12, lactate 90.08, nitrogen
of urea 28.01 g/mol."""

UNIT_RATIOS = {
    r"crea|krea|creatinine?|kreatinin\w*|cr[eé]atinin\w*": (88.40,),  # 113.12 g/mol
    r"gluc?k?ose|glucos[ai]o?|glicose|gl[yi]c[eéa]mi[ea]|blutzucker": (18.016,),  # 180.16
    r"lactate?|laktat|l?attato|lactato|acide lactique": (9.008,),  # 90.08
    # mg/dL of nitrogen (28.014), and of urea (60.06), to a mmol/L of urea; urea to its nitrogen.
    r"urea|bun|harnstoff\w*|ur[eé]e|ureia|azotemia": (2.801, 6.006, 2.144),
    r"h(a?e|ä|é)?moglobin\w*|emoglobina|hgb|hb": (10.0, 1.611, 16.11),  # monomer 16,114
    r"bilirr?ubin\w*": (17.10,),  # 584.66
    r"[ck]al[cz]ium|calcio": (4.008,),  # 40.078
    r"magn[eé]sium|magnesio": (2.431,),  # 24.305
    r"(an)?(ph|f)os(ph|f)at[eo]?|phosphor(e|us)?|f[oó]sforo": (3.097,),  # 30.974
    r"uric acid|urate|harns(ä|ae)ure|acide urique|[aá]cido [uú]rico": (59.48,),  # 168.11
    r"(\w* )?chol[eé]st[eé]rol\w*|cholesterin|colestero\w*|hdl|ldl": (38.67,),  # 386.65
    r"triglyc[eé]rides?|triglyzeride?|triglic[eé]rid\w*": (88.54,),  # 885.4
    r"ammoni(a|ak|ac|aca|um)|amon[ií]aco|nh3": (1.703,),  # 17.031
    r"iron|eisen|fer|hierro|ferro|sideremia": (5.585,),  # 55.845
    r"ferr?itin\w*": (2.247,),  # 445,000
    r"copper|kupfer|cuivre|cobre|rame": (6.355,),  # 63.546
    r"zink|zinco?": (6.538,),  # 65.38
    r"(vitamine?|vitamina)? ?b ?12|[ck]obalamin\w*": (1.355,),  # 1,355.4
    r"folate?|fols(ä|ae)ure|folic acid|acide folique|[aá]cido f[oó]lico|folatos?": (
        2.266,
    ),  # 441.4
    r"vitamine? d3?|vitamina d3?|25 ?oh ?d3?|calcidiol": (2.496,),  # 400.64
    r"[ck]ortisol\w*|cortisolo": (27.59,),  # 362.46
    r"f?t4|thyrox\w*|tirox\w*": (12.87,),  # 776.87
    r"f?t3|triiod?o?th?yronin\w*|trijodthyronin": (1.536,),  # 650.97
    r"test[oó]st[eé]ron\w*": (3.467, 28.84),  # 288.42, of ng/mL and of ng/dL
    r"o?estradiol\w*|östradiol|œstradiol": (3.671,),  # 272.38
    r"progest[eé]ron\w*": (3.180,),  # 314.46
    r"insulin\w*": (6.945, 6.0),  # pmol/L to a mIU/L, by the older and the newer standard
    r"[cz] ?pepti\w*|peptide c": (3.020, 331.1),  # 3,020, of nmol/L and of pmol/L
    r"bnp": (3.464,),  # 3,464
    r"nt ?pro ?bnp": (8.457,),  # 8,457
    r"digoxin\w*|digossina": (1.281,),  # 780.94
    r"vancom[yi]cin\w*": (1.449,),  # 1,449.3
    r"[pa]\w*racetamol\w*|acetaminophen": (6.616,),  # 151.16
    r"salic[yi]lat\w*": (13.81,),  # 138.12
    r"phenytoin\w*|ph[eé]nyto[iï]ne|fenito[ií]na": (3.964,),  # 252.27
    r"valpro\w*": (6.934,),  # 144.21
    r"ethanol|[eé]thanol|etanolo?|alcohol|alkohol|alcool": (4.607, 21.71),  # 46.068
    r"theoph[yi]llin\w*|teofillina|teofilina|th[eé]ophylline": (5.550,),  # 180.16
    r"homoc[yi]stein\w*|homocyst[eé]ine|omocisteina|homociste[ií]na": (7.397,),  # 135.18
    r"fibrinog[eèé]n\w*": (34.00,),  # 340,000
    r"[ck]arbama[zc]epin\w*": (4.232,),  # 236.27
    r"lead|blei|plomb|plomo|piombo": (20.72,),  # 207.2
    r"pth|parath\w*|paratormone": (9.425,),  # 9,425
    r"aldosteron\w*|aldost[eé]rone": (27.74,),  # 360.44
    # mmHg to a kPa; pounds to a kilogram; centimetres to an inch.
    r"p(a|v)?[oc]o?2|\w* ?pressure|blutdruck|pression|presi[oó]n|\w*bp|map": (7.5006,),
    r"weight|gewicht|poids|peso": (2.2046,),
    r"height|gr(ö|oe)(ß|ss)e|taille|talla|altezza|statura": (2.54,),
}
"""Ratios of the units in use, by words of a series' name.
Source: molar masses in g/mol, behind each; CIPM, pounds of 0.45359237 kg, mmHg of 133.322 Pa."""

SCALES = {
    r"temp|temp[eé]ratur\w*": (1.8, 32.0, "°F", "°C"),
    r"(hb ?)?a1c|glyc\w* h(a?e|ä)moglobin\w*": (10.93, -23.5, "mmol/mol", "%"),
}
"""Slope and offset from the last unit to the one before, by words of a name. Source: NGSP."""

POWERS = 10.0, 100.0, 1000.0  # of any unit: dL and L, m and u, percent

PREFIXES = {"": 1, "d": 1e-1, "c": 1e-2, "m": 1e-3, "u": 1e-6, "\N{MICRO SIGN}": 1e-6, "n": 1e-9}
PREFIXES |= {"\N{GREEK SMALL LETTER MU}": 1e-6, "p": 1e-12, "k": 1e3}
QUANTITY = re.compile(rf"({'|'.join(sorted(PREFIXES, reverse=True))})(g|mol|[lL]|I?U|eq|Eq)(?=/|$)")

EQUIVALENT = {"meq/l": 1.0, "mmol/l": 1.0}  # factors of units for ions of one charge
COUNTS = {
    **dict.fromkeys(("g/l", "109/l", "103/ul", "103/mm3", "k/ul", "tsd/ul", "/nl"), 1e9),
    **dict.fromkeys(("t/l", "1012/l", "106/ul", "106/mm3", "m/ul", "mio/ul", "/pl"), 1e12),
    **dict.fromkeys(("/ul", "/mm3", "cells/ul"), 1e6),
}
"""Cells a litre of units, in small letters and without signs of powers."""

SYNONYMS = (
    *(r"na|sodium|sodio|natrium|natr[ée]mie|natremia", r"cl|chlor\w*|cloro|cloruro"),
    *(r"k|potas\w*|kalium|kali[ée]mie|kaliemia", r"hco3|bicarb\w*|total co2|tco2"),
    *(r"crp|c ?reacti\w*|c réacti\w*|protéine c", r"pct|pro[ck]al[cz]itonin\w*", r"la[ck]t\w*"),
    *(r"wbc|leu[ck]\w*|white \w*|gl[oó]bul[eo]s blan\w*", r"plt|platelet\w*|thrombo[zc]yt\w*"),
    *(r"h[ae]?matocrit\w*|hkt|hct", r"alt|alat|gpt|sgpt", r"ast|asat|got|sgot"),
)
"""Words of the names of quantities that have no ratio of units."""

ANALYTES = {int(item): analyte for analyte in CHEMISTRY for item in analyte.keys}


def feature_of(analyte: Feature, gap_item: int, items: tuple[int | str, ...] = ()) -> Feature:
    """Return the feature of an analyte's items, or of some of them, with the gap that is used."""
    if GAP_ITEM not in analyte.keys or gap_item == GAP_ITEM:
        return Feature(analyte.name, analyte.unit, items or analyte.keys, analyte.plausible)
    # Another quantity than the reported gap: no model of one may pass for one of the other.
    name = f"{analyte.name} without potassium"
    return Feature(name, analyte.unit, (COMPUTED_GAP,), analyte.plausible)


class Conversion(NamedTuple):
    """From the unit of one cohort to that of another."""

    slope: float
    offset: float
    remedy: str  # what undoes it
    is_named: bool  # the table has it for this series

    def of_logs(self, logs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Convert logarithms; what has none any more is made very small."""
        converted = self.slope * np.exp(logs) + self.offset
        return np.log(np.maximum(converted, 1e-9))


def conversions(name: str) -> list[Conversion]:
    """Return the conversions between units in which a series may be given."""
    named, found = unit_ratios(name), list[Conversion]()
    for ratio in dict.fromkeys([*named, *POWERS]):
        is_named = ratio in named
        found.append(Conversion(ratio, 0.0, f"divided by {ratio:.4g}", is_named))
        found.append(Conversion(1 / ratio, 0.0, f"multiplied by {ratio:.4g}", is_named))
    for slope, offset, new, old in [SCALES[x] for x in _patterns_of(name, SCALES)]:
        found.append(Conversion(slope, offset, f"converted from {new} to {old}", is_named=True))
        words = f"converted from {old} to {new}"
        found.append(Conversion(1 / slope, -offset / slope, words, is_named=True))
    return found


def unit_ratios(name: str) -> tuple[float, ...]:
    """Return the ratios of the units in which laboratories give a series, none where unknown."""
    return next((UNIT_RATIOS[x] for x in _patterns_of(name, UNIT_RATIOS)), ())


def pattern_of(name: str) -> str:
    """Return what the names of one quantity share, in some languages; empty where unknown."""
    return next(iter(_patterns_of(name, (*SYNONYMS, *UNIT_RATIOS))), "")


def _patterns_of(name: str, table: Iterable[str]) -> list[str]:
    """Return the patterns of which whole words of a name are one."""
    words = " ".join(re.findall(r"\w+", comparable(name)))
    return [pattern for pattern in table if re.search(rf"\b(?:{pattern})\b", words)]


def prefix_ratios(unit: str, target: str) -> tuple[float, ...]:
    """Return the ratio of units that differ in their prefixes alone, as mg/dL and mg/L."""
    parts = [QUANTITY.findall(text) for text in (unit, target)]
    bases = [[base.lower() for _, base in part] for part in parts]
    if len(parts[0]) != 2 or bases[0] != bases[1]:
        return ()
    one, other = (PREFIXES[above] / PREFIXES[below] for (above, _), (below, _) in parts)
    return (one / other,)


def choose_features(names: Sequence[str], gap_item: int) -> list[Feature]:
    """Return the features of some analytes by name, or of all, the anion gap first."""
    analytes = {comparable(analyte.name): analyte for analyte in CHEMISTRY}
    keys = [comparable(name) for name in names]
    keys = list(analytes) if keys == [ALL_SERIES] else keys
    for key, name in zip(keys, names, strict=False):
        if key not in analytes:
            all_names = ", ".join(analyte.name for analyte in CHEMISTRY)
            raise InputError(f"--series {name}: no such series: all, or some of {all_names}")
    if len(set(keys)) < len(keys):
        raise InputError("--series: name each series once")
    return [feature_of(analytes[key], gap_item) for key in keys]


def items_to_read(features: Sequence[Feature]) -> set[int]:
    """Return the items whose values features are made of."""
    items = {int(key) for feature in features for key in feature.keys}
    return items - {COMPUTED_GAP} | (set(GAP_COMPONENTS) if COMPUTED_GAP in items else set())


def find_factors(units: pd.DataFrame, features: Sequence[Feature], path: str) -> pd.DataFrame:
    """Add ``factor`` to items and units, NaN where unknown; refuse such units of ``features``."""
    factors = pd.Series(np.nan, index=units.index)
    for item in units["item"].unique().tolist():
        unit_texts = units.loc[units["item"] == item, "unit"]
        lower = unit_texts.str.lower()
        # Of an item that is no analyte the one unit is read that it has.
        factor_of = {min(filter(None, lower), default=""): 1.0}
        if item in ANALYTES:
            factor_of = FACTORS.get(ANALYTES[item].name, EQUIVALENT)
        if item in items_to_read(features) and not set(lower) - {""} <= factor_of.keys():
            units_text = ", ".join(map(repr, sorted(set(unit_texts) - {""})))
            problem = "nothing converts them"
            if item in ANALYTES:
                problem = f"the units must be among {', '.join(factor_of)}"
            raise InputError(f"{path}: item {item} has values in {units_text}: {problem}")
        factors[unit_texts.index] = lower.map(factor_of)
    return units.assign(factor=factors.astype(float))
