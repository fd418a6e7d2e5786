"""The style sheet of the report, with the colours and shapes of the markers on the map."""

from deepclust.report.scatter_plot import COLOURS

DOT, SQUARE = "stroke-linecap:round;border-radius:50%", "stroke-linecap:square;border-radius:0"

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f5f6f8;--ink:#14171c;--dim:#5b6270;--line:#d9dde4;
 --c0:#2563eb;--c1:#d9560b;--c2:#0d8f63}
@media screen and (prefers-color-scheme:dark){:root{--bg:#121417;--card:#1b1e23;--ink:#e8eaee;--dim:#9aa2b0;
 --line:#333942;--c0:#6ea0ff;--c1:#f08a48;--c2:#3cc592}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:1rem;background:var(--bg);color:var(--ink);
 font:16px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
h1,h2,h3,h4,p,figure,dl,dd{margin:0}
h1,h3,dd,pre,.dim,figcaption{overflow-wrap:anywhere}
h1{font-size:1.7rem}h2{font-size:1.25rem;margin:2.2rem 0 .6rem}h3{font-size:1.05rem}
h3 span{font-weight:400;margin-left:.4em}
h4{font-size:.8rem;font-weight:400;color:var(--dim);margin:.6rem 0 .2rem}
.dim,dt{color:var(--dim)}.dim,dl,figcaption{font-size:.9rem}
nav{margin-top:.9rem}nav a{color:var(--c0);margin-right:1rem}
.tiles div,article,figure,pre,.stage{padding:.8rem;background:var(--card);border:1px solid var(--line);
 border-radius:10px}
.tiles,.cards,.plots{display:grid;gap:.8rem}
.tiles{grid-template-columns:repeat(auto-fit,minmax(190px,1fr));margin:.9rem 0 .5rem}
.tiles b{font-size:2.1rem;line-height:1.1}
.tiles p{color:var(--dim);font-size:.85rem}
.cards{--tile:58px;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--tile)*var(--wide) + 1.6rem),1fr));
 margin-top:.6rem}
.photos{--tile:108px}
.strip{display:grid;grid-template-columns:repeat(var(--wide),1fr);gap:3px}
.strip img,.strip canvas{width:100%;height:auto;display:block;border-radius:3px}
.trust{margin-top:.5rem;font-size:1.15rem}.trust::first-letter{text-transform:uppercase}
h3 .name{font-size:1.2rem;overflow-wrap:anywhere}
h3 .name[contenteditable]{border-bottom:1px dashed var(--dim);cursor:text}
h3 .name[contenteditable]:empty::before{content:"no name yet";font-weight:400;color:var(--dim)}
.names{margin:.3rem 0}
button{font:inherit;font-size:.85rem;padding:.15rem .7rem;color:var(--ink);background:var(--card);
 border:1px solid var(--line);border-radius:6px;cursor:pointer}button:disabled{opacity:.4}
.viewable .strip img,.strip canvas{cursor:zoom-in}
.drawer{margin-top:.7rem}.drawer summary{color:var(--c0);font-size:.9rem}.drawer .strip{margin-top:.4rem;
 grid-template-columns:repeat(auto-fill,minmax(max(44px,min(var(--tile),6.5rem)*.7),1fr))}
.drawer canvas{content-visibility:auto}.sheet{max-width:100%;margin-top:.4rem}
.viewer{max-width:96vw;max-height:96vh;padding:.8rem;background:var(--card);color:var(--ink);text-align:center;
 border:1px solid var(--line);border-radius:10px}.viewer::backdrop{background:#000a}
.viewer canvas{max-width:100%;border-radius:4px}.viewer p{margin-top:.5rem;max-width:36rem;overflow-wrap:anywhere}
.viewer a{color:var(--c0);margin:0 .5rem}
.groups{display:flex;flex-wrap:wrap;gap:.6rem;margin-top:.6rem}.group{padding:.4rem}
.group .strip{display:flex;flex-wrap:wrap}.group .strip img{width:108px}
.tree{display:flex;gap:.8rem;margin-top:.6rem;max-width:900px}
.tree ul{flex:none;max-width:60%;margin:0;padding:0;list-style:none}
.tree li{display:flex;align-items:center;justify-content:flex-end;gap:.5rem;height:34px;font-size:.9rem;line-height:1.1}
.tree li img{height:30px;border-radius:3px}
.tree a{color:inherit;text-decoration:none;overflow-wrap:anywhere;order:-1;text-align:right}
.tree path{fill:none;stroke:var(--c0);stroke-width:2;vector-effect:non-scaling-stroke}
ol{margin:.3rem 0;padding-left:1.4rem}
.strip .odd{outline:2px solid var(--c1);outline-offset:-1px}
.px{image-rendering:pixelated}
.map{width:100%;max-width:720px;border:1px solid var(--line)}
.bar{height:4px;background:var(--line);margin-top:.35rem}
.bar i{display:block;height:100%;background:var(--c0)}
.scroll{overflow-x:auto}
.heat{border-spacing:2px;font-size:.8rem;margin-top:.5rem}
.heat td,.heat th{min-width:2.9rem;height:1.9rem;padding:0 .3rem;text-align:center;font-weight:400}
.heat td{border-radius:3px;box-shadow:inset 0 0 0 1px var(--line)}
.heat th{color:var(--dim)}
.heat th:first-child{position:sticky;left:0;background:var(--bg)}
.heat tr:first-child th{height:auto;vertical-align:bottom}
.heat th span{writing-mode:vertical-rl;transform:rotate(180deg);white-space:nowrap}
.plots{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
figcaption span{color:var(--dim);margin-right:.9em;white-space:nowrap}
figcaption i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.35em}
svg{width:100%;height:auto;display:block}
.plots text{font-size:11px;fill:var(--dim)}
.grid{stroke:var(--line)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
path.c0{stroke:var(--c0)}path.c1{stroke:var(--c1)}path.c2{stroke:var(--c2)}
circle.c0{fill:var(--c0)}circle.c1{fill:var(--c1)}circle.c2{fill:var(--c2)}
i.c0{background:var(--c0)}i.c1{background:var(--c1)}i.c2{background:var(--c2)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.7rem 0}
pre{margin:.4rem 0;font-size:.85rem;white-space:pre-wrap}
summary{cursor:pointer}
.embedding{max-width:1000px;margin:.6rem auto 0}
.embedding input{margin:0 .4rem 0 0}
.embedding label{margin-right:1rem;font-size:.9rem}
.embedding #colour0{margin-left:1rem}
.stage{position:relative;padding:0;margin:.5rem 0;cursor:crosshair}
.stage path{stroke:currentColor}
.stage text{font-size:26px;font-weight:600;text-anchor:middle;dominant-baseline:central;fill:var(--ink);
 stroke:var(--card);stroke-width:5px;paint-order:stroke}
.faded path:not(.lit){opacity:.12}
.ring{display:none;fill:none;stroke:var(--ink);stroke-width:4}
.tip{position:absolute;z-index:1;align-items:flex-start;max-width:min(17rem,100%);padding:.45rem;display:flex;gap:.6rem;pointer-events:none;
 background:var(--bg);border:1px solid var(--line);border-radius:8px;font-size:.85rem;line-height:1.35;
 white-space:pre-line;overflow-wrap:anywhere;box-shadow:0 2px 10px #0004}
.tip canvas{flex:none}
[hidden]{display:none!important}
.legend{display:flex;flex-wrap:wrap;gap:.15rem .9rem;font-size:.85rem;max-height:9rem;overflow:auto}
.legend i{display:inline-block;width:.75em;height:.75em;margin-right:.3em;background:currentColor}
#place0:checked~.stage .p1,#place1:checked~.stage .p0,#colour1:checked~.by-k,#colour1:checked~.stage .by-k,
 #colour0:checked~.by-l,#colour0:checked~.stage .by-l,.narrow{display:none}
@media(max-width:560px){.tiles{grid-template-columns:1fr}
 .strip{grid-template-columns:repeat(var(--narrow),1fr)}
 .embedding #colour0{margin-left:0}.narrow{display:inline}
 .heat{font-size:.72rem}.heat td,.heat th{min-width:1.9rem;padding:0 .1rem}
 .stage text{font-size:36px}}
@media print{*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
 body{max-width:none;padding:0;font-size:12px}
 nav,.tip,.screen,.embedding input,.embedding label{display:none}summary{list-style:none}
 article,figure,.tiles div,.heat tr,#Map{break-inside:avoid}h2,h3{break-after:avoid}
 .cards{grid-template-columns:repeat(auto-fill,minmax(min(100%,44px*var(--narrow) + 1.6rem),1fr))}
 .strip{grid-template-columns:repeat(var(--narrow),1fr)}h4{margin:.2rem 0 0}
 .cards.photos{grid-template-columns:1fr}.photos .strip{grid-template-columns:repeat(var(--wide),1fr)}
 .photos article{padding:.4rem}.drawer,.viewer{display:none}.group .strip img{width:62px}
 h3 .name[contenteditable]{border:0}
 h3 .name:empty::before{content:""!important}.tree{break-inside:avoid}
 .plots{grid-template-columns:repeat(3,1fr)}.plots text{font-size:13px}
 dl{grid-template-columns:repeat(2,max-content 1fr)}
 .embedding{break-inside:avoid;max-width:16cm}.legend{max-height:none}.scroll{overflow:visible}
 .heat{font-size:min(.8rem,calc(45rem / var(--n) / 2.6));border-spacing:1px}
 .heat td,.heat th{min-width:0;padding:0 .15em;height:1.6em}.heat th:first-child{position:static}
 details::details-content{content-visibility:visible;height:auto}details pre{columns:3;font-size:8px;line-height:1.2}}
"""
# On the map, class `k3` is the marker 3 for a cluster and `l3` the marker 3 for a class, which applies while the button
# `colour1`, "by label", is chosen. The last marker is that of images without a label.
for marker, colour in enumerate([*COLOURS, *COLOURS, "var(--line)"]):
    shape = SQUARE if marker // len(COLOURS) == 1 else DOT
    STYLE += f".k{marker},#colour1:checked~.stage .l{marker},.by-l .l{marker}{{color:{colour};{shape}}}\n"
