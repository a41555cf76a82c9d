// Lights up the region under the cursor, without a request. Gradio runs this with `props` and `watch`.
// props.value is the label map of the preview, "WIDTH HEIGHT DATA", see `numbers_for_page` in drawing.py.
const canvas = document.createElement('canvas');
canvas.id = 'under-cursor';
canvas.style.cssText = 'position: absolute; pointer-events: none; object-fit: scale-down; max-width: none';
let width = 0, height = 0, numbers = null, lit = 0;

function clear() {
  lit = 0;
  canvas.remove();
}

async function read() {
  clear();
  numbers = null;
  const value = props.value;
  if (!value) return;
  const [wide, high, data] = value.split(' ');
  const packed = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate'));
  const bytes = await new Response(stream).arrayBuffer();
  if (value !== props.value) return; // a newer one is being read
  [width, height, numbers] = [Number(wide), Number(high), new Uint32Array(bytes)];
}

// The region at an event, 0 for none. The picture is centred in its element, and shrunk if it does not fit.
function under(event, image) {
  const box = image.getBoundingClientRect();
  const scale = Math.min(1, box.width / width, box.height / height);
  const x = Math.floor((event.clientX - box.left - (box.width - width * scale) / 2) / scale);
  const y = Math.floor((event.clientY - box.top - (box.height - height * scale) / 2) / scale);
  return x >= 0 && y >= 0 && x < width && y < height ? numbers[y * width + x] : 0;
}

function draw(image) {
  canvas.width = width;
  canvas.height = height;
  const drawn = new Uint32Array(width * height); // a pixel: alpha, blue, green, red
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && numbers[y * width + x] === lit;
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      if (numbers[at] !== lit) drawn[at] = 0x4d000000;
      else if (inside(x - 2, y) && inside(x + 2, y) && inside(x, y - 2) && inside(x, y + 2)) drawn[at] = 0x33ffffff;
      else drawn[at] = 0xffffffff;
    }
  }
  canvas.getContext('2d').putImageData(new ImageData(new Uint8ClampedArray(drawn.buffer), width, height), 0, 0);
  canvas.dataset.region = lit;
  for (const [side, from] of Object.entries({ left: 'Left', top: 'Top', width: 'Width', height: 'Height' })) {
    canvas.style[side] = `${image[`offset${from}`]}px`;
  }
  image.after(canvas);
}

function move(event) {
  const image = event.target;
  const known = numbers && image.matches?.('#result img') && image.naturalWidth === width && image.naturalHeight === height;
  const number = known ? under(event, image) : 0;
  if (!number) return clear();
  if (number === lit && canvas.previousSibling === image) return;
  lit = number;
  draw(image);
}

window.padsegHover?.abort(); // if Gradio has run this before
window.padsegHover = new AbortController();
const options = { signal: window.padsegHover.signal };
document.addEventListener('pointermove', move, options);
document.documentElement.addEventListener('pointerleave', clear, options);
window.addEventListener('resize', clear, options);
watch('value', read);
