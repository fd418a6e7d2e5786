"""The script of the map: pointing at a point, tapping it or moving to it with the arrow keys shows its image.

It reads the points from the paths that scatter_plot.py draws, whose attributes `data-k` and `data-l` hold cluster and
label; names, confidence and the place of the pictures are in the JSON element `points`.
"""

SCRIPT = """
(() => {
const MAX_DISTANCE = 24, GAP = 14, SIDE = 96;  // pixels of the screen
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const stage = document.querySelector('.stage'), tip = stage.querySelector('.tip');
const canvas = tip.querySelector('canvas'), caption = tip.querySelector('span');
const sprite = document.getElementById('sprite');
const data = JSON.parse(document.getElementById('points').textContent), tile = data.tile;
const drawings = [...stage.querySelectorAll('svg')].map(svg => ({svg, points: [...svg.querySelectorAll('path')].flatMap(
  path => path.getAttribute('d').slice(1).split('M').map(text => {
    const [x, y] = text.split(' ').map(parseFloat);
    return {x, y, k: path.dataset.k, l: path.dataset.l};
  }))}));
let current = -1;

function visibleDrawing() {
  const {svg, points} = drawings.find(({svg}) => svg.getClientRects().length);
  const box = svg.getBoundingClientRect();
  return {points, box, ring: svg.querySelector('.ring'), scale: box.width / svg.viewBox.baseVal.width};
}

function hide() {
  tip.hidden = true;
  current = -1;
  for (const {svg} of drawings) svg.querySelector('.ring').style.display = 'none';
}

function show(index) {
  if (index === current) return;
  hide();
  current = index;
  const {points, ring, scale} = visibleDrawing(), {x, y, k, l} = points[index];
  ring.setAttribute('cx', x);
  ring.setAttribute('cy', y);
  ring.style.display = 'inline';
  const lines = ['cluster ' + k, 'confidence ' + data.confidence[index].toFixed(2)];
  if (data.labels) lines.push('label: ' + data.labels[l]);
  caption.textContent = [...lines, data.names[index]].join('\\n');
  canvas.hidden = !tile;
  if (tile) {
    const zoom = SIDE / Math.max(tile.w, tile.h);
    canvas.width = tile.w * zoom;
    canvas.height = tile.h * zoom;
    const context = canvas.getContext('2d');
    context.imageSmoothingEnabled = !tile.sharp;
    const left = tile.dx * (index % tile.columns), top = tile.dy * Math.floor(index / tile.columns);
    context.drawImage(sprite, left, top, tile.w, tile.h, 0, 0, canvas.width, canvas.height);
  }
  tip.hidden = false;
  const maxLeft = stage.clientWidth - tip.offsetWidth, above = y * scale - tip.offsetHeight - GAP;
  tip.style.left = Math.max(0, Math.min(maxLeft, x * scale - tip.offsetWidth / 2)) + 'px';
  tip.style.top = (above < 0 ? y * scale + GAP : above) + 'px';
}

function nearest(points, cost) {
  let best = -1, lowest = Infinity;
  points.forEach((point, index) => {
    const value = cost(point);
    if (value < lowest) [best, lowest] = [index, value];
  });
  return [best, lowest];
}

function showNearest(event) {
  const {points, box, scale} = visibleDrawing();
  const x = (event.clientX - box.left) / scale, y = (event.clientY - box.top) / scale;
  const [index, distance] = nearest(points, p => Math.hypot(p.x - x, p.y - y));
  if (distance * scale <= MAX_DISTANCE) show(index); else hide();
}

function unfade() { stage.classList.remove('faded'); }

stage.addEventListener('pointermove', showNearest);
stage.addEventListener('pointerdown', event => { unfade(); showNearest(event); });
stage.addEventListener('pointerleave', event => { if (event.pointerType === 'mouse') hide(); });
stage.addEventListener('focus', () => { if (stage.matches(':focus-visible')) show(0); });
stage.addEventListener('blur', hide);
stage.addEventListener('keydown', event => {
  if (event.key === 'Escape') hide();
  if (!(event.key in ARROWS)) return;
  event.preventDefault();
  const {points} = visibleDrawing(), [right, down] = ARROWS[event.key], from = points[Math.max(0, current)];
  const [index] = nearest(points, p => {
    const x = p.x - from.x, y = p.y - from.y, along = x * right + y * down;
    return along > 0 ? along + 2 * Math.abs(x * down + y * right) : Infinity;
  });
  if (index >= 0) show(index);
});
for (const input of document.querySelectorAll('.embedding input')) input.addEventListener('change', hide);
for (const legend of document.querySelectorAll('.legend')) {
  legend.addEventListener('pointerover', event => {
    const chip = event.target.closest('span');
    if (!chip) return;
    const [[kind, group]] = Object.entries(chip.dataset);
    for (const path of stage.querySelectorAll('path')) path.classList.toggle('lit', path.dataset[kind] === group);
    stage.classList.add('faded');
  });
  legend.addEventListener('pointerleave', event => { if (event.pointerType === 'mouse') unfade(); });
}
})();
"""
