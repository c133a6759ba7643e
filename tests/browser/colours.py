"""Colours as eyes see them: contrast as WCAG 2.2 defines it, and what two people in a hundred men see instead.

Reference formulas, written from their sources; a colour is (red, green, blue), each from 0 to 255.
"""

from __future__ import annotations

import math
from typing import Any

from tests.browser.chromium import Tab

Colour = tuple[float, float, float]

# Machado, Oliveira and Fernandes (2009), severity 1: what becomes of linear red, green and blue.
DEFICIENCIES = {
    "none": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}

TEXTS = """(() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const parse = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
    const ground = (element) => {
        if (!element) return [255, 255, 255];
        const colour = parse(getComputedStyle(element).backgroundColor);
        return colour[3] === 1 ? colour.slice(0, 3) : over(colour, ground(element.parentElement));
    };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        const field = element.matches("input[type=number], input[type=password], select, textarea");
        if (!element.checkVisibility({ opacityProperty: true }) || element.closest(".unseen, noscript")) continue;
        if (element.disabled || element.closest("label")?.querySelector(":disabled")) continue;
        for (const pseudo of [null, "::before", "::after", "::placeholder"]) {
            const style = getComputedStyle(element, pseudo), content = style.content;
            if ((pseudo === "::before" || pseudo === "::after") && (content === "none" || content === '""')) continue;
            if (pseudo === null ? !(own || field) : pseudo === "::placeholder" && !element.placeholder) continue;
            const around = pseudo === "::before" || pseudo === "::after";
            const under = around ? over(parse(style.backgroundColor), ground(element)) : ground(element);
            const ink = parse(element.namespaceURI.endsWith("svg") ? style.fill : style.color);
            found.push({
                what: `${element.tagName}#${element.id}.${element.getAttribute("class") ?? ""}${pseudo ?? ""}`
                    + `: ${element.textContent.slice(0, 30)}`,
                ink: over([...ink.slice(0, 3), ink[3] * Number(style.opacity)], under), under,
                size: parseFloat(style.fontSize), weight: Number(style.fontWeight),
            });
        }
    }
    return found;
})()"""


def texts(tab: Tab) -> list[dict[str, Any]]:
    """Every visible text of the page with its colour, what is under it, its size in pixels and its weight."""
    return tab.js(TEXTS)


def pixels(tab: Tab, expressions: list[str]) -> list[Colour]:
    """Colours of CSS, given as JavaScript that evaluates to them, as the screen shows them."""
    return [
        tuple(found)
        for found in tab.js(
            f"""[{", ".join(expressions)}].map((colour) => {{
                const canvas = new OffscreenCanvas(1, 1).getContext("2d");
                canvas.fillStyle = colour;
                canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
            }})"""
        )
    ]


def linear(colour: Colour) -> Colour:
    """Light, from 0 to 1, of an sRGB colour."""
    r, g, b = (c / 255 for c in colour)
    return tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b))  # type: ignore[return-value]


def luminance(colour: Colour) -> float:
    r, g, b = linear(colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(first: Colour, second: Colour) -> float:
    """WCAG's ratio, from 1 to 21."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def wanted(size: float, weight: float) -> float:
    """The ratio that level AA asks of a text: 4.5, and 3 of a large one (24 px, or 18.66 px and bold)."""
    return 3.0 if size >= 24 or (size >= 18.66 and weight >= 700) else 4.5


def oklab(colour: Colour, deficiency: str = "none") -> Colour:
    """Björn Ottosson's Lab of a colour as someone with a deficiency sees it: lightness 0 to 1, and two axes of hue."""
    light = linear(colour)
    r, g, b = (min(max(sum(m * c for m, c in zip(row, light, strict=True)), 0), 1) for row in DEFICIENCIES[deficiency])
    long = math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b)
    medium = math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b)
    short = math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b)
    return (
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )


def distance(first: Colour, second: Colour, deficiency: str) -> float:
    """How far apart two colours look (in Oklab, where 0.02 can just be told)."""
    return math.dist(oklab(first, deficiency), oklab(second, deficiency))
