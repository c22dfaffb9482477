"""The style sheet of the report: one for light and dark, for wide and narrow windows and for paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f5f7f9; --ink: #1a1f26; --muted: #59636e; --rule: #dbe1e7; --grid: #e6eaee;
  --one: #8b96a3; --two: #0b66c3; --three: #c2570c; --good: #1a7f4b; --warn-back: #fff6e0; --warn: #6b4a00;
  --t0: #0b66c3; --t1: #12907a; --t2: #d08700; --t3: #8250df; --t4: #c2366b; --t5: #5f7f1f; --t6: #2a9bd6;
  --kept: #a8b1bc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151a; --panel: #191f26; --ink: #e4e9ee; --muted: #98a3af; --rule: #2d353e; --grid: #262e37;
    --one: #7d8996; --two: #5aa9f5; --three: #f0914a; --good: #5cc98b; --warn-back: #2d2512; --warn: #f0cf86;
    --t0: #5aa9f5; --t1: #3fc0a6; --t2: #e5b146; --t3: #b08df2; --t4: #ee7fa6; --t5: #a3c45c; --t6: #7cc8ee;
    --kept: #5d6874;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 56rem; margin: 0 auto; padding: 2.25rem 1.25rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 2.6rem 0 .35rem; }
h3 { font-size: .92rem; margin: 1.5rem 0 .2rem; font-weight: 600; }
.curves h3 { margin: 0; font-size: .82rem; overflow-wrap: anywhere; }
p { margin: .35rem 0 .8rem; max-width: 46rem; }
.kicker { color: var(--muted); font-size: .85rem; margin: 0 0 .25rem; }
.facts { color: var(--muted); margin: .4rem 0 1.5rem; overflow-wrap: anywhere; }
.note { color: var(--muted); font-size: .88rem; }
.missing { background: var(--warn-back); color: var(--warn); padding: .65rem .9rem; border-radius: 6px;
  max-width: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.4rem, 1fr)); gap: .55rem; margin: 0; }
.tile.wide { grid-column: span 2; }
.tile { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: .7rem .75rem; }
.tile dt { color: var(--muted); font-size: .8rem; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.32rem; line-height: 1.35; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile .detail { color: var(--muted); font-size: .82rem; line-height: 1.4; }
.arrow { color: var(--muted); font-weight: 400; padding: 0 .12em; }
figure { margin: .6rem 0 0; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--two); outline-offset: 2px; }
figure svg { display: block; width: 100%; min-width: 37rem; height: auto; }
figure.bar svg { min-width: 0; height: 26px; border-radius: 4px; }
figure.bar figcaption { display: flex; justify-content: space-between; font-size: .85rem; margin: .7rem 0 .2rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem 1.1rem;
  margin: .9rem 0 0; padding: 0; list-style: none; }
.curves svg { display: block; width: 100%; height: 54px; }
.curves .detail { color: var(--muted); font-size: .78rem; font-variant-numeric: tabular-nums; }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: .5rem 0 0; padding: 0; list-style: none;
  font-size: .85rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em;
  vertical-align: -.06em; }
text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
  fill: var(--muted); font-variant-numeric: tabular-nums; }
text.label, text.value { fill: var(--ink); }
text.value { font-size: 10px; } text.value.on { fill: var(--page); }
.grid { stroke: var(--grid); } .axis { stroke: var(--rule); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.line.one { stroke: var(--one); } .line.two { stroke: var(--two); } .line.three { stroke: var(--three); }
.dot.one { fill: var(--one); } .dot.two { fill: var(--two); } .dot.three { fill: var(--three); }
.cell { fill: var(--two); }
rect.kept { fill: var(--kept); } rect.t0 { fill: var(--t0); } rect.t1 { fill: var(--t1); } rect.t2 { fill: var(--t2); }
rect.t3 { fill: var(--t3); } rect.t4 { fill: var(--t4); } rect.t5 { fill: var(--t5); } rect.t6 { fill: var(--t6); }
i.one { background: var(--one); } i.two { background: var(--two); } i.three { background: var(--three); }
i.kept { background: var(--kept); } i.t0 { background: var(--t0); } i.t1 { background: var(--t1); }
i.t2 { background: var(--t2); } i.t3 { background: var(--t3); } i.t4 { background: var(--t4); }
i.t5 { background: var(--t5); } i.t6 { background: var(--t6); }
details { margin: .9rem 0 0; border-top: 1px solid var(--rule); padding-top: .6rem; }
summary { cursor: pointer; font-weight: 600; font-size: .92rem; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; margin-top: .6rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: .4rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule);
  vertical-align: baseline; }
th { font-weight: 600; color: var(--muted); }
th.text, td.text, tbody th { text-align: left; }
tbody th { font-weight: 400; color: var(--ink); }
td.wrap { white-space: normal; min-width: 9rem; }
.means dt { font-weight: 600; font-size: .9rem; margin-top: .7rem; }
.means dd { margin: 0; color: var(--muted); font-size: .9rem; max-width: 46rem; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: .8rem; color: var(--muted);
  font-size: .82rem; }
@media (max-width: 34rem) {
  main { padding: 1.25rem .9rem 2rem; } h1 { font-size: 1.35rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: .55rem; } .tile { padding: .6rem .7rem; }
  .tile.wide { grid-column: 1 / -1; } .tile .value { font-size: 1.2rem; }
}
@media print { details > * { display: block; } .tile, .missing { break-inside: avoid; } }
"""
