"""How the report card looks: readable on a phone by day, and at three at night without waking anybody."""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b2530; --soft: #5a6775; --rule: #dbe1e8; --wash: #f0f3f6;
  --c0: #2566b0; --c1: #b8560a; --c2: #157a5b; --c3: #7d4aa8; --c4: #a92f56; --c5: #8794a3; --on: #fff }
@media (prefers-color-scheme: dark) {
  :root { --paper: #10151b; --ink: #d3dae2; --soft: #95a1ae; --rule: #2b343e; --wash: #1b232c;
    --c0: #74abec; --c1: #eda35c; --c2: #55c7a0; --c3: #bd98e2; --c4: #ec84a2; --c5: #738091; --on: #10151b }
}
* { box-sizing: border-box }
body, svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
body { font-size: 16px; line-height: 1.5; margin: 0 auto; max-width: 66rem; padding: 1rem 1rem 4rem;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.45rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--rule) }
p { margin: .4rem 0; max-width: 44rem }
code { font-size: .88em; background: var(--wash); padding: .1em .25em; border-radius: 3px }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0 }
.tiles div { background: var(--wash); border-radius: 8px; padding: .6rem .8rem }
.tiles dt { color: var(--soft); font-size: .85rem; line-height: 1.3 }
.tiles dd { margin: 0; font-size: 1.3rem; font-weight: 600; line-height: 1.35 }
.word { display: inline-block; border: 1px solid currentColor; border-radius: 4px; padding: 0 .45em; font-weight: 600 }
.executed { color: var(--c2) }
.emulated, .compiled { color: var(--c1) }
.unverified { color: var(--soft) }

.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.2rem 2.5rem }
figure { margin: .8rem 0; max-width: 30rem; min-width: 0 }
figcaption { font-weight: 600; margin-bottom: .5rem }
.note, .missing { color: var(--soft); font-size: .9rem }
.missing { border-left: 3px solid var(--rule); padding-left: .7rem }
details { margin: .5rem 0 }
summary { color: var(--soft); font-size: .9rem; cursor: pointer; padding: .35rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; margin: .4rem 0; overflow-wrap: normal }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top }
th { font-weight: 400 }
.long { overflow-wrap: anywhere; min-width: 9rem }
th[scope=col] { color: var(--soft); font-size: .85rem }
th[scope=row] { min-width: 6.5rem }
.n { text-align: right; font-variant-numeric: tabular-nums }
td.n { white-space: nowrap }

svg { display: block; width: 100%; height: auto; overflow: visible; font-size: 12px }
.t, .v { fill: var(--ink) }
.v { font-weight: 600; font-variant-numeric: tabular-nums }
.tick, .tiny { fill: var(--soft); font-size: 11px }
.tiny { font-size: 10px }
.onmark { fill: var(--on); font-size: 11px; font-weight: 700; pointer-events: none }
.track { fill: var(--wash) }
.grid { stroke: var(--rule) }
.diagonal { stroke: var(--soft); stroke-dasharray: 5 4 }
.whisker { stroke: var(--ink); stroke-width: 1.5; fill: none }
.ring { fill: none; stroke: var(--c1); stroke-width: 2 }
.dot { stroke: var(--paper); stroke-width: 1 }
.line { fill: none; stroke-width: 2; stroke-linejoin: round }
.s0 { fill: var(--c0) }
.s1 { fill: var(--c1) }
.s2 { fill: var(--c2) }
.s3 { fill: var(--c3) }
.s4 { fill: var(--c4) }
.s5 { fill: var(--c5) }
.l0 { stroke: var(--c0) }
.l1 { stroke: var(--c1); stroke-dasharray: 7 3 }
.l2 { stroke: var(--c2); stroke-dasharray: 2 3 }
.l3 { stroke: var(--c3); stroke-dasharray: 9 3 2 3 }
.l4 { stroke: var(--c4); stroke-dasharray: 4 4 }
.l5 { stroke: var(--c5) }
@media print { figure, tr { break-inside: avoid } }
"""

POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)
"""The page's own word to the browser: no script, nothing to fetch, no style but this one, whatever a name may hold."""
