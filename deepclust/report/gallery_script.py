"""The script of the gallery: drawers of all images, a picture enlarged on a click, names of clusters to be edited."""

SCRIPT = """
(() => {
const viewer = document.querySelector('.viewer'), large = viewer.querySelector('canvas');
const caption = viewer.querySelector('.caption'), link = viewer.querySelector('a');
let shown = [], current = 0;  // the pictures that can be looked through, and the position of the one that is enlarged

function enlarge(position) {
  current = position;
  const tile = shown[current], sharp = tile.classList.contains('px');
  const width = tile.naturalWidth || tile.width, height = tile.naturalHeight || tile.height;
  const zoom = Math.max(1, Math.min(520, innerWidth - 60, innerHeight - 170) / Math.max(width, height));
  const pixels = sharp ? Math.max(1, Math.floor(zoom)) : zoom;
  large.width = Math.round(width * pixels);
  large.height = Math.round(height * pixels);
  const context = large.getContext('2d');
  context.imageSmoothingEnabled = !sharp;
  context.imageSmoothingQuality = 'high';
  context.drawImage(tile, 0, 0, large.width, large.height);
  caption.textContent = tile.title;
  link.hidden = !tile.dataset.link;
  if (tile.dataset.link) link.href = tile.dataset.link;
  viewer.querySelector('.back').disabled = current === 0;
  viewer.querySelector('.next').disabled = current === shown.length - 1;
  if (!viewer.open) viewer.showModal();
}
function step(by) {
  if (shown[current + by]) enlarge(current + by);
}
function isPicture(element) {
  return element.matches('.strip img, .drawer canvas');
}
function open(tile) {
  shown = [...(tile.closest('.drawer') || tile.closest('.strip')).querySelectorAll('img:not(.sheet), canvas')];
  enlarge(shown.indexOf(tile));
}
for (const picture of document.querySelectorAll('.strip img')) picture.tabIndex = 0;
document.addEventListener('click', event => { if (isPicture(event.target)) open(event.target); });
document.addEventListener('keydown', event => {
  if (event.key === 'Enter' && isPicture(event.target)) open(event.target);
});
viewer.addEventListener('keydown', event => {
  if (event.key === 'ArrowLeft') step(-1);
  if (event.key === 'ArrowRight') step(1);
  if (event.key === 'Escape') viewer.close();
});
viewer.addEventListener('click', event => {
  if (event.target === viewer || event.target.matches('.close')) viewer.close();
  if (event.target.matches('.back')) step(-1);
  if (event.target.matches('.next')) step(1);
});

function fill(drawer) {
  const sheet = drawer.querySelector('.sheet'), data = JSON.parse(drawer.dataset.sheet);
  const place = document.createElement('div');
  place.className = 'strip';
  data.names.forEach((name, index) => {
    const tile = document.createElement('canvas');
    tile.width = data.w;
    tile.height = data.h;
    tile.tabIndex = 0;
    tile.title = name + ', cluster ' + data.cluster + ', confidence ' + data.confidence[index].toFixed(2);
    if (data.links) tile.dataset.link = data.links[index];
    if (data.sharp) tile.className = 'px';
    const left = data.dx * (index % data.columns), top = data.dy * Math.floor(index / data.columns);
    tile.getContext('2d').drawImage(sheet, left, top, data.w, data.h, 0, 0, data.w, data.h);
    place.append(tile);
  });
  drawer.append(place);
  sheet.hidden = true;
}
for (const drawer of document.querySelectorAll('.drawer')) {
  drawer.addEventListener('toggle', async () => {
    if (!drawer.open || drawer.querySelector('.strip')) return;
    const sheet = drawer.querySelector('.sheet');
    sheet.loading = 'eager';
    await sheet.decode();
    if (!drawer.querySelector('.strip')) fill(drawer);
  });
}

const tools = document.querySelector('.names');
if (!tools) return;
const titles = [...document.querySelectorAll('h3 .name')], status = tools.querySelector('output');
function write() {
  const names = Object.fromEntries(titles.map(title => [title.dataset.k, title.textContent.trim()]));
  const others = JSON.parse(tools.dataset.names);  // of clusters that are not shown
  const all = Object.entries({...others, ...names}).filter(([, name]) => name);
  return JSON.stringify(Object.fromEntries(all), null, 2) + '\\n';
}
for (const title of titles) {
  title.contentEditable = 'plaintext-only';
  title.spellcheck = false;
  title.addEventListener('keydown', event => { if (event.key === 'Enter') { event.preventDefault(); title.blur(); } });
  title.addEventListener('input', () => {
    status.textContent = 'not saved yet';
    for (const other of document.querySelectorAll(`.name[data-k="${title.dataset.k}"]`)) {
      if (other !== title) other.textContent = title.textContent.trim();
    }
  });
}
tools.hidden = false;
tools.querySelector('.save').addEventListener('click', () => {
  const file = document.createElement('a');
  file.href = URL.createObjectURL(new Blob([write()], {type: 'application/json'}));
  file.download = 'names.json';
  file.click();
  status.textContent = 'put names.json beside this report';
});
tools.querySelector('.copy').addEventListener('click', async () => {
  try {
    await navigator.clipboard.writeText(write());
    status.textContent = 'copied: the content of names.json, which lies beside this report';
  } catch {
    status.textContent = 'the browser does not allow it';
  }
});
})();
"""
