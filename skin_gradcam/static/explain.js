// Makes every viewer of the page (templates/viewer.html.j2) one picture with controls. Without it all maps stand side by
// side. It listens on the document, so that viewers which come later work too, and touches nothing outside [data-vw].
'use strict'
document.documentElement.classList.add('vw-js')
document.addEventListener('input', ({target}) => {
  const viewer = target.closest('[data-vw]'), what = target.dataset.vwSet
  if (!viewer || !what) return
  if (what === 'show')
    for (const p of viewer.querySelectorAll('.vw-panel')) p.classList.toggle('vw-on', p.dataset.vwPanel === target.value)
  if (what === 'map') viewer.classList.toggle('vw-plain', !target.checked)
  if (what === 'line') viewer.classList.toggle('vw-noline', !target.checked)
  if (what === 'alpha') {
    viewer.style.setProperty('--vw-alpha', target.value / 100)
    target.parentElement.querySelector('output').value = target.value + ' %'
    const map = viewer.querySelector('[data-vw-set=map]')
    if (!map.checked) { map.checked = true; viewer.classList.remove('vw-plain') }
  }
})
