/** Drawing a table as a heat map on a canvas. Colors are matplotlib's viridis, as in the pack's other pictures. */

/** @typedef {import("./table.js").Table} Table */

/**
 * Where the cells are, in the canvas's own units.
 * @typedef {{left: number, top: number, width: number, height: number}} Box
 */

/**
 * @typedef {object} Look
 * @property {string} text color
 * @property {string} background color; empty for none
 * @property {string} empty color of a step that is still to come
 * @property {number} size of the text, in pixels
 * @property {string} [title]
 */

const VIRIDIS = [
  "440154", "48186a", "472d7b", "424086", "3b528b", "33638d", "2c728e", "26828e", "21918c",
  "1fa088", "28ae80", "3fbc73", "5ec962", "84d44b", "addc30", "d8e219", "fde725",
].map((hex) => [0, 2, 4].map((start) => parseInt(hex.slice(start, start + 2), 16)));

/**
 * Red, green and blue, 0 to 255.
 * @param {number} share from 0 to 1
 */
export function viridis(share) {
  const place = Math.min(1, Math.max(0, share)) * (VIRIDIS.length - 1);
  const low = Math.min(VIRIDIS.length - 2, Math.floor(place));
  return VIRIDIS[low].map((value, i) => Math.round(value + (place - low) * (VIRIDIS[low + 1][i] - value)));
}

/**
 * Draw a table so that it fills width x height.
 * @param {CanvasRenderingContext2D} context
 * @param {Table} table
 * @param {number} width
 * @param {number} height
 * @param {Look} look
 * @returns {Box} where the cells are
 */
export function drawHeatmap(context, table, width, height, look) {
  context.clearRect(0, 0, width, height);
  if (look.background) {
    context.fillStyle = look.background;
    context.fillRect(0, 0, width, height);
  }
  context.font = `${look.size}px sans-serif`;
  context.fillStyle = look.text;
  const labels = rowLabels(table, (height - 3 * look.size) / table.rows.length, look.size);
  const widest = Math.max(0, ...labels.map(({ text }) => context.measureText(text).width));
  const left = Math.min(widest, width * 0.4) + look.size;
  const top = look.title ? 2.2 * look.size : look.size / 2;
  const box = { left, top, width: width - left - 4.5 * look.size, height: height - top - 2.6 * look.size };

  drawCells(context, table, box, look);
  drawRowLabels(context, labels, table.rows.length, box, look);
  drawStepAxis(context, table.steps, box, look);
  drawScale(context, table, { left: box.left + box.width + look.size, top, width: look.size, height: box.height }, look);
  if (look.title) {
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillText(fit(context, look.title, width - look.size), look.size / 2, look.size * 1.2);
  }
  return box;
}

/**
 * The row and step under a point, or null.
 * @param {Box} box
 * @param {Table} table
 * @param {number} x
 * @param {number} y
 */
export function cellAt(box, table, x, y) {
  const step = Math.floor(((x - box.left) / box.width) * table.steps);
  const row = Math.floor(((y - box.top) / box.height) * table.rows.length);
  const inside = step >= 0 && step < table.steps && row >= 0 && row < table.rows.length;
  return inside ? { row, step } : null;
}

/**
 * Labels that fit: every row's own where rows are high enough, else the first row of each block of the model has the block's.
 * @param {Pick<Table, "rows" | "blocks">} table
 * @param {number} rowHeight
 * @param {number} textSize
 * @returns {{row: number, text: string}[]}
 */
export function rowLabels({ rows, blocks }, rowHeight, textSize) {
  if (rowHeight >= textSize * 1.05) return rows.map((text, row) => ({ row, text }));
  const labels = [];
  let previous = "";
  let next = -Infinity;
  for (const [row, block] of blocks.entries()) {
    if (block !== previous && row * rowHeight >= next) {
      labels.push({ row, text: block });
      next = row * rowHeight + textSize * 1.05;
    }
    previous = block;
  }
  return labels;
}

/**
 * A text that is no wider than this, its end cut off if need be.
 * @param {CanvasRenderingContext2D} context
 * @param {string} text
 * @param {number} width
 */
function fit(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let length = text.length;
  while (length > 0 && context.measureText(`${text.slice(0, length)}…`).width > width) length--;
  return `${text.slice(0, length)}…`;
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Table} table
 * @param {Box} box
 * @param {Look} look
 */
function drawCells(context, table, box, look) {
  context.fillStyle = look.empty;
  context.fillRect(box.left, box.top, box.width, box.height);
  if (table.rows.length === 0 || table.steps === 0) return;
  const small = document.createElement("canvas"); // a pixel per cell
  small.width = table.steps;
  small.height = table.rows.length;
  const pixels = new ImageData(table.steps, table.rows.length);
  table.values.forEach((value, cell) => {
    if (!Number.isNaN(value)) pixels.data.set([...viridis((value - table.least) / (table.most - table.least)), 255], 4 * cell);
  });
  /** @type {CanvasRenderingContext2D} */ (small.getContext("2d")).putImageData(pixels, 0, 0);
  // More rows than pixels are averaged; fewer have sharp edges.
  context.imageSmoothingEnabled = table.rows.length > box.height;
  context.drawImage(small, box.left, box.top, box.width, box.height);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {{row: number, text: string}[]} labels
 * @param {number} rows
 * @param {Box} box
 * @param {Look} look
 */
function drawRowLabels(context, labels, rows, box, look) {
  const rowHeight = box.height / rows;
  context.fillStyle = look.text;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const { row, text } of labels) {
    const y = box.top + row * rowHeight + Math.max(rowHeight, look.size) / 2;
    context.fillText(fit(context, text, box.left - look.size), box.left - look.size / 2, y);
  }
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {number} steps
 * @param {Box} box
 * @param {Look} look
 */
function drawStepAxis(context, steps, box, look) {
  context.textAlign = "center";
  context.textBaseline = "top";
  const apart = (2.5 * look.size * steps) / box.width; // two labels, at least, in steps
  const every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((n) => n >= apart) ?? steps;
  for (let step = 1; step <= steps; step++) {
    if (step % every === 0 || (step === 1 && every - 1 >= apart)) {
      context.fillText(String(step), box.left + ((step - 0.5) / steps) * box.width, box.top + box.height + look.size * 0.3);
    }
  }
  context.fillText("step", box.left + box.width / 2, box.top + box.height + look.size * 1.4);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Table} table
 * @param {Box} box
 * @param {Look} look
 */
function drawScale(context, table, box, look) {
  for (let y = 0; y < box.height; y++) {
    context.fillStyle = `rgb(${viridis(1 - y / box.height).join(" ")})`;
    context.fillRect(box.left, box.top + y, box.width, 1.5);
  }
  context.fillStyle = look.text;
  context.textAlign = "left";
  context.textBaseline = "top";
  context.fillText(String(table.most), box.left + box.width * 1.3, box.top);
  context.textBaseline = "bottom";
  context.fillText(String(table.least), box.left + box.width * 1.3, box.top + box.height);
}
