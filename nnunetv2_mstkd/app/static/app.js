// The page of mstkd app. The server knows the state and sends it whenever it changes; this script draws it.
import { Niivue } from "/niivue.js";

const LABELS = 1, UNCERTAINTY = 2; // places of the overlays above the shown sequence
const CERTAIN = 20; // percent of the largest entropy up to which the map of uncertainty stays clear
const AT_A_TIME = 4; // uploads
const byId = (id) => document.getElementById(id);
const problems = new Set(); // what this page has to say itself
let state = { images: [], jobs: [], problems: [], notices: [], available: [] };
let beside = null; // the subset that the right view shows
let ended = false;

const element = (name, text = "", properties = {}) => Object.assign(document.createElement(name), { textContent: text }, properties);
const reasonOf = async (answer) => (await answer.text()) || `The server answers with ${answer.status}.`;

async function send(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, { method: "POST", ...options });
  } catch {
    throw new Error("The server does not answer; is mstkd app still running?");
  }
  if (!answer.ok) throw new Error(await reasonOf(answer));
  return answer;
}

const model = await (await fetch("/api/model")).json();
const opened = await fetch("/api/sessions", { method: "POST" });
if (!opened.ok) {
  problems.add(await reasonOf(opened));
  drawProblems();
  throw new Error("no session");
}
const own = `/api/sessions/${(await opened.json()).session}`;
let posted = Promise.resolve(); // one after the other: the last choice of the user is the one that counts
const post = (path, content = {}) => (posted = posted.then(() => act(() => send(`${own}/${path}`, { body: JSON.stringify(content) }))));

/** Do something for the user, and say what went wrong. */
async function act(work) {
  problems.clear();
  try {
    await work();
  } catch (error) {
    problems.add(error.message);
  }
  drawProblems();
}

// ---- images --------------------------------------------------------------------------------------------------------

/** All files of dropped folders and files; those that systems hide or add are left out. */
async function dropped(items) {
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) found.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    else {
      const reader = entry.createReader();
      const next = () => new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      for (let some = await next(); some.length > 0; some = await next()) for (const each of some) await walk(each);
    }
  };
  // all at once, since the browser forgets them after the first wait
  const entries = [...items].map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile()).filter(Boolean);
  for (const entry of entries) {
    if (entry instanceof File) found.push(entry);
    else await walk(entry);
  }
  return found;
}

let uploaded = Promise.resolve(); // one drop after the other
let unsorted = false; // whether files of a drop that failed may have arrived

function upload(chosen) {
  const files = [...chosen].filter((file) => !file.name.startsWith(".") && file.name !== "DICOMDIR");
  return (uploaded = uploaded.then(() => act(() => uploadAll(files))));
}

async function uploadAll(files) {
  const size = files.reduce((sum, file) => sum + file.size, 0);
  if (size > model.limit) throw new Error(`These files have ${Math.ceil(size / 2 ** 20)} MB, and this page takes ${model.limit / 2 ** 20} MB (mstkd app --max-upload).`);
  if (unsorted) await discard();
  let done = 0;
  const waiting = [...files];
  const work = async () => {
    for (let file = waiting.shift(); file; file = waiting.shift()) {
      const headers = { "X-File-Name": encodeURIComponent(file.name) };
      await send(`${own}/files`, { body: file, headers });
      byId("reading").textContent = `Reading ${++done} of ${files.length}`;
    }
  };
  try {
    const workers = Array.from({ length: AT_A_TIME }, () => work().catch((error) => { waiting.length = 0; throw error; }));
    const failed = (await Promise.allSettled(workers)).find((worker) => worker.reason);
    if (failed) {
      unsorted = true;
      await discard().catch(() => {}); // or before the next drop
      throw failed.reason;
    }
    byId("reading").textContent = files.length ? "Checking" : "";
    await send(`${own}/sort`);
  } finally {
    byId("reading").textContent = "";
  }
}

/** Forget what arrived of a drop that failed: it would join the images of the next one, of another patient perhaps. */
async function discard() {
  await send(`${own}/discard`);
  unsorted = false;
}

for (const id of ["files", "folder"]) {
  byId(id).addEventListener("change", async (event) => {
    await upload(event.target.files);
    event.target.value = ""; // the same file can be chosen again
  });
}
addEventListener("dragover", (event) => { event.preventDefault(); byId("drop").classList.add("over"); });
addEventListener("dragleave", () => byId("drop").classList.remove("over"));
addEventListener("drop", async (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  upload(await dropped(event.dataTransfer.items));
});
byId("clear").addEventListener("click", () => post("clear"));

function rowOf(image) {
  const select = element("select", "", { id: `sequence-${image.number}` });
  select.setAttribute("aria-label", `Sequence of ${image.name}`);
  select.append(element("option", "choose", { value: "?", disabled: true }));
  select.append(...model.modalities.map((name) => element("option", name, { value: name })));
  select.append(element("option", "leave out", { value: "" }));
  select.addEventListener("change", () => post(`images/${image.number}`, { modality: select.value || null }));
  const row = element("tr");
  row.append(element("td", image.name), element("td"));
  row.lastChild.append(select);
  return row;
}

function drawImages() {
  const body = byId("images").tBodies[0];
  // A row stays while its image does, so that the choice of a sequence by keyboard goes on where it was.
  const rows = state.images.map((image) => byId(`sequence-${image.number}`)?.closest("tr") ?? rowOf(image));
  for (const row of [...body.rows]) if (!rows.includes(row)) row.remove();
  rows.forEach((row, place) => { if (body.rows[place] !== row) body.insertBefore(row, body.rows[place] ?? null); });
  for (const image of state.images) byId(`sequence-${image.number}`).value = image.modality ?? (image.leftOut ? "" : "?");
  byId("case").hidden = rows.length === 0;
}

function drawProblems() {
  const texts = [...problems, ...state.problems, ...state.notices];
  const list = byId("problems");
  if (list.dataset.shown === JSON.stringify(texts)) return;
  list.dataset.shown = JSON.stringify(texts);
  list.replaceChildren(...texts.map((text) => element("li", text)));
  list.hidden = texts.length === 0;
}

function expectedText() {
  if (!state.ready) return "";
  const from = `From ${state.available.join(" + ")}`;
  if (state.expected) return `${from}: expected Dice ${Object.entries(state.expected).map(([region, dice]) => `${region} ${dice.toFixed(2)}`).join(", ")} (mean of the evaluation's cases, no promise for this one).`;
  return `${from}. The Dice to expect is not known: ${model.evaluated ? "this subset was not evaluated." : "the model has no evaluation (mstkd evaluate)."}`;
}

// ---- segmentations -------------------------------------------------------------------------------------------------

const full = () => state.available.join("+");
const withoutOne = (name) => state.available.filter((each) => each !== name).join("+");
const jobOf = (subset) => state.jobs.find((job) => job.subset === subset);
const resultOf = (subset) => state.jobs.find((job) => job.subset === subset && job.state === "done");
const isOver = (job) => job === undefined || job.state === "failed" || job.state === "cancelled";

byId("segment").addEventListener("click", () => post("jobs"));

function drawJobs() {
  const under = state.jobs.filter((job) => job.state === "waiting" || job.state === "running");
  byId("jobs").replaceChildren(
    ...under.map((job) => {
      const row = element("div", "", { className: "job" });
      const progress = element("progress", "", { max: 1 });
      if (job.state === "running") progress.value = job.progress;
      progress.setAttribute("aria-label", `Segmenting from ${job.subset}`);
      const cancel = element("button", "Cancel", { type: "button" });
      cancel.addEventListener("click", () => post(`jobs/${job.number}/cancel`));
      const text = job.state === "waiting" ? "waits for another segmentation" : job.progress ? `${Math.round(100 * job.progress)} %` : "preparing";
      row.append(element("span", `${job.subset}: ${text}`), progress, cancel);
      return row;
    }),
    ...state.jobs.filter((job) => job.state === "failed").map((job) => element("p", `${job.subset}: ${job.message}`)),
  );
  byId("segment").disabled = !state.ready || !isOver(jobOf(full()));
  const buttons = state.available.map((name) => {
    const subset = withoutOne(name);
    const button = element("button", `Without ${name}`, { type: "button", id: `without-${name}` });
    button.setAttribute("aria-pressed", String(beside === subset));
    button.addEventListener("click", () => {
      beside = beside === subset ? null : subset;
      if (beside && isOver(jobOf(subset))) post("jobs", { drop: [name] });
      draw();
    });
    return button;
  });
  const focused = document.activeElement?.id;
  byId("without").replaceChildren(...buttons);
  if (focused?.startsWith("without-")) byId(focused)?.focus();
  byId("whatif").hidden = state.available.length < 2 || !resultOf(full());
}

function drawResults() {
  const jobs = [resultOf(full()), resultOf(beside)].filter(Boolean);
  byId("result").hidden = jobs.length === 0;
  if (jobs.length === 0) return;
  const compared = jobs.length > 1 && jobs[1].agreement;
  const head = element("tr");
  head.append(element("th", "region"), ...jobs.map((job) => element("th", `${job.subset}, ml`)));
  if (compared) head.append(element("th", "Dice of both"));
  const evaluated = jobs.some((job) => job.expected);
  if (evaluated) head.append(...jobs.map((job) => element("th", jobs.length > 1 ? `expected Dice, ${job.subset}` : "expected Dice")));
  for (const cell of head.cells) cell.scope = "col";
  const rows = Object.keys(jobs[0].volumes).map((region) => {
    const row = element("tr");
    const name = element("th", "", { scope: "row" });
    name.append(swatch(model.regions[region]), region);
    row.append(name, ...jobs.map((job) => element("td", job.volumes[region].toFixed(2))));
    if (compared) row.append(element("td", jobs[1].agreement[region].toFixed(2)));
    if (evaluated) row.append(...jobs.map((job) => element("td", job.expected?.[region]?.toFixed(2) ?? "")));
    return row;
  });
  const table = byId("volumes");
  table.replaceChildren(element("thead"), element("tbody"));
  table.tHead.append(head);
  table.tBodies[0].append(...rows);
  byId("meaning").textContent = compared
    ? "Dice of both: how alike the two segmentations are, 1 if they are the same. It does not say which one is right."
    : `Segmented in ${jobs[0].seconds} s.`;
  const link = (job, file, text) => element("a", text, { href: `${own}/jobs/${job.number}/${file}`, download: "" });
  byId("downloads").replaceChildren(
    ...jobs.map((job) => {
      const line = element("li", `${job.subset}: `);
      line.append(link(job, "segmentation.nii.gz", "segmentation (NIfTI)"), ", ", link(job, "uncertainty.nii.gz", "uncertainty (NIfTI)"));
      if (job.dicom) line.append(", ", link(job, "segmentation.dcm", "DICOM SEG"));
      return line;
    }),
  );
}

function swatch(color) {
  const box = element("span", "", { className: "swatch" });
  box.style.background = color;
  return box;
}

// ---- viewer --------------------------------------------------------------------------------------------------------

/** One canvas: the shown sequence, and above it the segmentation and uncertainty of a job. */
class View {
  constructor(id) {
    this.figure = byId(id);
    this.shown = "";
    this.nv = new Niivue({
      backColor: [0, 0, 0, 1], show3Dcrosshair: true, multiplanarShowRender: 1, multiplanarLayout: 2, isRadiologicalConvention: true,
      dragAndDropEnabled: false, loadingText: "", logLevel: "error", crosshairWidth: 0.6, crosshairWidthUnit: "mm", crosshairColor: [1, 0.85, 0.2, 0.8],
      tileMargin: 2,
    });
    this.nv.onIntensityChange = () => readWindow(this);
  }

  /** Show an image of the case with the result of a job, if there is one. */
  async show(image, job) {
    const wanted = JSON.stringify([image.file, job?.number]);
    if (this.shown === wanted) return;
    this.shown = wanted;
    this.figure.hidden = false;
    if (!this.nv.canvas) {
      await this.nv.attachToCanvas(this.figure.querySelector("canvas"));
      this.nv.setSliceType(this.nv.sliceTypeMultiplanar);
    }
    const placed = this === right ? left : this; // both views show the same place
    const place = placed.nv.volumes.length ? placed.nv.frac2mm(placed.nv.scene.crosshairPos) : null;
    const volumes = [{ url: `${own}/${image.file}`, name: image.file.split("/")[1], colormap: "gray" }];
    if (job) {
      for (const name of ["segmentation.nii.gz", "uncertainty.nii.gz"]) {
        volumes.push({ url: `${own}/jobs/${job.number}/${name}`, name, opacity: 0 });
      }
      Object.assign(volumes[UNCERTAINTY], { colormap: "inferno", cal_min: CERTAIN, cal_max: 100 });
    }
    await this.nv.loadVolumes(volumes);
    if (this.shown !== wanted) return; // another image was chosen while this one was loaded
    if (job) this.nv.volumes[LABELS].setColormapLabel(labelColors());
    const center = this === left && job && !this.hadJob ? job.center : place && [...place].slice(0, 3);
    this.hadJob = Boolean(job);
    if (center) this.nv.scene.crosshairPos = this.nv.mm2frac(center);
    this.blend();
    readWindow(this);
    this.figure.dataset.shown = job ? job.subset : image.modality;
  }

  hide() {
    this.figure.hidden = true;
    this.shown = "";
  }

  /** Show the segmentation, or the uncertainty instead. */
  blend() {
    if (this.nv.volumes.length <= UNCERTAINTY) return;
    const opacity = Number(byId("opacity").value), uncertain = byId("uncertain").checked;
    this.nv.volumes[LABELS].opacity = uncertain ? 0 : opacity;
    this.nv.volumes[UNCERTAINTY].opacity = uncertain ? opacity : 0;
    this.nv.updateGLVolume();
  }
}

const left = new View("left"), right = new View("right");
const views = () => [left, right].filter((view) => !view.figure.hidden && view.nv.volumes.length > 0);
left.nv.broadcastTo([right.nv], { "2d": true, "3d": true });
right.nv.broadcastTo([left.nv], { "2d": true, "3d": true });

function labelColors() {
  const map = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
  for (const [value, color] of Object.entries(model.labels)) {
    ["R", "G", "B"].forEach((part, place) => map[part].push(color[place]));
    map.A.push(255);
    map.I.push(Number(value));
    map.labels.push(value);
  }
  return map;
}

/** Move the sliders to the window that NiiVue chose, or that was dragged in it, and give it to the other view. */
function readWindow(view) {
  const volume = view.nv.volumes[0];
  const range = volume.global_max - volume.global_min;
  Object.assign(byId("window"), { min: range / 1000, max: range, value: volume.cal_max - volume.cal_min });
  Object.assign(byId("level"), { min: volume.global_min, max: volume.global_max, value: (volume.cal_min + volume.cal_max) / 2 });
  for (const other of views()) if (other !== view) setWindow(other, volume.cal_min, volume.cal_max);
}

function setWindow(view, low, high) {
  const volume = view.nv.volumes[0];
  if (volume.cal_min === low && volume.cal_max === high) return;
  Object.assign(volume, { cal_min: low, cal_max: high });
  view.nv.updateGLVolume();
}

for (const id of ["window", "level"]) {
  byId(id).addEventListener("input", () => {
    const half = Number(byId("window").value) / 2, level = Number(byId("level").value);
    for (const view of views()) setWindow(view, level - half, level + half);
  });
}
for (const id of ["opacity", "uncertain"]) byId(id).addEventListener("input", () => views().forEach((view) => view.blend()));
byId("base").addEventListener("change", drawViewer);

let drawing = Promise.resolve();

function drawViewer() {
  const used = state.ready ? state.images.filter((image) => state.available.includes(image.modality)) : [];
  byId("viewer").hidden = used.length === 0;
  const select = byId("base");
  const names = used.map((image) => image.modality);
  if (JSON.stringify([...select.options].map((option) => option.value)) !== JSON.stringify(names)) {
    const before = select.value;
    select.replaceChildren(...names.map((name) => element("option", name, { value: name })));
    select.value = names.includes(before) ? before : names.at(-1) ?? "";
  }
  const image = used.find((each) => each.modality === select.value);
  const jobs = [resultOf(full()), resultOf(beside)];
  byId("uncertain").disabled = !jobs[0];
  if (!jobs[1] || !image) right.hide();
  if (!image) return;
  left.figure.firstChild.textContent = jobs[0] ? `Segmented from ${jobs[0].subset}` : image.modality;
  if (jobs[1]) right.figure.firstChild.textContent = `Segmented from ${jobs[1].subset}`;
  // one after the other: a view loads one image at a time
  drawing = drawing.then(async () => {
    await left.show(image, jobs[0]);
    if (jobs[1]) await right.show(image, jobs[1]);
  }).catch((error) => {
    problems.add(`The viewer cannot show this image: ${error.message}`);
    drawProblems();
  });
}

// ---- all of it -----------------------------------------------------------------------------------------------------

function draw() {
  drawProblems();
  byId("expected").textContent = expectedText();
  drawJobs();
  drawResults();
  drawViewer();
}

byId("model").textContent = model.name;
byId("modalities").textContent = model.modalities.join(", ");
byId("example").hidden = !model.example;
byId("example").textContent = `Images to try are in ${model.example}`;
byId("legend").replaceChildren(...Object.entries(model.regions).map(([region, color]) => {
  const line = element("li");
  line.append(swatch(color), region);
  return line;
}));

const events = new EventSource(`${own}/events`);
events.onmessage = (event) => {
  const before = JSON.stringify(state.images);
  state = JSON.parse(event.data);
  if (JSON.stringify(state.images) !== before) {
    beside = null;
    drawImages();
  }
  problems.delete("The server does not answer; is mstkd app still running?");
  draw();
};
const end = (text) => {
  if (ended) return;
  ended = true;
  events.close();
  problems.add(text);
  drawProblems();
  byId("segment").disabled = true;
};
events.addEventListener("closed", () => end("This page was idle for long, so its images were removed; reload it and drop them again."));
events.onerror = () => {
  if (events.readyState === EventSource.CLOSED) end("The server has forgotten this page; reload it and drop the images again.");
  else {
    problems.add("The server does not answer; is mstkd app still running?");
    drawProblems();
  }
};
addEventListener("pagehide", () => navigator.sendBeacon(`${own}/close`));
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
document.documentElement.dataset.ready = "true";
