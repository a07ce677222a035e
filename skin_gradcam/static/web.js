// The page's own script: takes a picture by file, drop, paste or camera, sends it, and shows the answer without a new page.
// Without it the two forms work as plain forms. No inline style or handler anywhere: the content security policy forbids both.
'use strict'
document.documentElement.classList.add('js')
{
const $ = id => document.getElementById(id), form = $('form')
const calm = matchMedia('(prefers-reduced-motion: reduce)')
let running = null

const say = text => { $('status').textContent = text }

function busy(on, text) {
  $('work').hidden = !on
  form.classList.toggle('working', on)
  $('doing').textContent = text || ''
  if (on) { $('progress').removeAttribute('value'); say(text) }
}

function show(nodes) {
  $('answer').replaceChildren(...nodes)
  ready($('answer'))
  const card = $('answer').firstElementChild
  $('start').classList.toggle('small', card.classList.contains('answer'))
  say(card.dataset.said)
  document.title = $('answer-title').textContent + ' · skin_gradcam'
  $('answer-title').focus({preventScroll: true})
  card.scrollIntoView({block: 'start', behavior: calm.matches ? 'auto' : 'smooth'})
}

// A refusal that is known before or without an answer of the service; text only, whatever it holds
function refuse(title, detail) {
  const card = document.createElement('section'), h = document.createElement('h2'), p = document.createElement('p')
  card.className = 'card refused'
  card.setAttribute('aria-labelledby', 'answer-title')
  card.dataset.said = title + '. ' + detail
  h.id = 'answer-title'; h.tabIndex = -1; h.textContent = title
  p.className = 'lead'; p.textContent = detail
  card.append(h, p)
  show([card])
}

function answered(xhr) {
  const kind = xhr.getResponseHeader('Content-Type') || ''
  if (kind.startsWith('text/html')) return show([...new DOMParser().parseFromString(xhr.responseText, 'text/html').body.children])
  let said = {}
  try { said = JSON.parse(xhr.responseText) } catch { /* a proxy's page; the status alone must do */ }
  refuse(said.title || 'No answer', said.detail || `The service answered with status ${xhr.status}. Try again in a minute.`)
}

function send(data) {
  if (running) running.abort()
  const xhr = running = new XMLHttpRequest()
  const done = next => () => { if (running === xhr) { running = null; busy(false); next() } }
  xhr.open('POST', '/answer')
  xhr.setRequestHeader('X-Fragment', '1')
  xhr.upload.onprogress = e => { if (e.lengthComputable && e.total > 2e5) $('progress').value = e.loaded / e.total }
  xhr.upload.onload = () => { $('progress').removeAttribute('value'); $('doing').textContent = 'Looking at it' }
  xhr.onload = done(() => answered(xhr))
  xhr.onerror = done(() => refuse('The service cannot be reached', 'Check the connection, then send the picture again.'))
  xhr.onabort = done(() => say('Cancelled.'))
  busy(true, 'Sending the picture')
  xhr.send(data)
}

async function preview(file) {
  const c = $('preview')
  try {
    const im = await createImageBitmap(file)
    const k = Math.min(1, 640 / Math.max(im.width, im.height))
    c.width = Math.max(1, im.width * k); c.height = Math.max(1, im.height * k)
    c.getContext('2d').drawImage(im, 0, 0, c.width, c.height)
    im.close()
    c.hidden = false
  } catch { c.hidden = true }  // a format that this browser does not show; the service may read it
  form.classList.toggle('chosen', !c.hidden)
}

function take(files) {
  const file = files[0], max = +form.dataset.max
  if (!file) return
  preview(file)
  if (file.size > max) {
    const mb = n => (n / 2 ** 20).toFixed(1)
    return refuse('Too many bytes', `This file has ${mb(file.size)} MB, at most ${mb(max)} MB are taken. Make the picture smaller, or save it as JPEG.`)
  }
  const data = new FormData()
  data.append('picture', file, 'picture')
  send(data)
}

if (form) {
  for (const id of ['picture', 'camera']) $(id).addEventListener('change', e => { take(e.target.files); e.target.value = '' })
  form.addEventListener('submit', e => e.preventDefault())
  $('demos')?.addEventListener('submit', e => {
    e.preventDefault()
    $('preview').hidden = true
    form.classList.remove('chosen')
    const data = new FormData()
    data.append('demo', e.submitter.value)
    send(data)
  })
  $('cancel').addEventListener('click', () => { if (running) running.abort(); $('picture').focus() })
  document.addEventListener('paste', e => { if (e.clipboardData.files.length) { e.preventDefault(); take(e.clipboardData.files) } })
  const holds = e => e.dataTransfer && [...e.dataTransfer.types].includes('Files')
  document.addEventListener('dragover', e => { if (holds(e)) { e.preventDefault(); form.classList.add('over') } })
  document.addEventListener('dragleave', e => { if (!e.relatedTarget) form.classList.remove('over') })
  document.addEventListener('drop', e => { if (holds(e)) { e.preventDefault(); form.classList.remove('over'); take(e.dataTransfer.files) } })
}

// Zoom: all panels of a viewer show the same part of the frame, so it is enough to change what they look at
const looks = new WeakMap()
const held = (v, low, high) => Math.min(Math.max(v, low), high)

function look(stage, change) {
  const svgs = stage.querySelectorAll('svg'), {width, height} = svgs[0].viewBox.baseVal
  const was = looks.get(stage) || {k: 1, x: .5, y: .5, w: width, h: height}, v = {...was, ...change(was)}
  v.k = held(v.k, 1, 8)
  v.x = held(v.x, .5 / v.k, 1 - .5 / v.k)
  v.y = held(v.y, .5 / v.k, 1 - .5 / v.k)
  looks.set(stage, v)
  const box = [(v.x - .5 / v.k) * v.w, (v.y - .5 / v.k) * v.h, v.w / v.k, v.h / v.k].map(n => n.toFixed(1)).join(' ')
  for (const s of svgs) s.setAttribute('viewBox', box)
  stage.classList.toggle('zoomed', v.k > 1)
  const area = stage.closest('.seen')
  area.querySelector('.zoom output').value = Math.round(100 * v.k) + ' %'
  return v
}

function ready(root) {
  const stage = root.querySelector('.vw-stage')
  if (!stage) return
  stage.tabIndex = 0
  stage.setAttribute('role', 'group')
  stage.setAttribute('aria-label', 'Picture and map')
  stage.setAttribute('aria-describedby', 'zoom-help')
}

const arrows = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}
document.addEventListener('keydown', e => {
  if (!e.target.matches('.vw-stage')) return
  const [dx, dy] = arrows[e.key] || [0, 0], k = {'+': 1.5, '=': 1.5, '-': 1 / 1.5}[e.key]
  if (k) look(e.target, v => ({k: v.k * k}))
  else if ((dx || dy) && e.target.matches('.zoomed')) look(e.target, v => ({x: v.x + .2 * dx / v.k, y: v.y + .2 * dy / v.k}))
  else return
  e.preventDefault()
})

let grip = null
document.addEventListener('pointerdown', e => {
  const svg = e.target.closest('.zoomed svg')
  if (!svg || e.button) return
  grip = {stage: svg.closest('.vw-stage'), svg, x: e.clientX, y: e.clientY, moved: 0}
  e.preventDefault()
})
document.addEventListener('pointermove', e => {
  if (!grip) return
  const r = grip.svg.getBoundingClientRect(), dx = e.clientX - grip.x, dy = e.clientY - grip.y
  look(grip.stage, v => ({x: v.x - dx / r.width / v.k, y: v.y - dy / r.height / v.k}))
  Object.assign(grip, {x: e.clientX, y: e.clientY, moved: grip.moved + Math.abs(dx) + Math.abs(dy)})
})
document.addEventListener('pointerup', e => {
  if (grip && grip.moved < 5) {
    const r = grip.svg.getBoundingClientRect()
    look(grip.stage, v => ({x: v.x + ((e.clientX - r.left) / r.width - .5) / v.k, y: v.y + ((e.clientY - r.top) / r.height - .5) / v.k}))
  }
  grip = null
})
document.addEventListener('pointercancel', () => { grip = null })
addEventListener('beforeprint', () => { for (const s of document.querySelectorAll('.vw-stage.zoomed')) look(s, () => ({k: 1})) })

ready(document)
document.addEventListener('click', e => {
  const step = e.target.closest('[data-zoom]')?.dataset.zoom
  if (step) look(e.target.closest('.seen').querySelector('.vw-stage'), v => ({k: v.k * 1.5 ** +step}))
  if (e.target.closest('[data-print]')) print()
  if (e.target.closest('[data-again]')) { e.preventDefault(); $('start').scrollIntoView(); $('picture').focus() }
})
}
